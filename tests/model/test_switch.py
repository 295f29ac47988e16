"""`disable_adapter`: the base model inside, the adapted one before and after."""

import asyncio
import copy
import pickle
import threading

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from fastlora import ExportError, InjectionError, LoRALinear, MergeError, disable_adapter
from fastlora.model.switch import eval_mode
from tests.support.models import Decoder, TokenLinear, Tokens, randomise_adapters
from tests.support.versions import needs_torch


def pair(dropout=0.5):
    """(base, the same base adapted), in training mode."""
    base = Decoder()
    model = copy.deepcopy(base)
    fastlora.inject_lora(model, ["to_", "mlp"], rank=4, dropout=dropout)
    randomise_adapters(model)
    fastlora.freeze_base_params(model)
    return base, model


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inside_it_equals_the_base_bit_for_bit(training, dtype):
    base, model = pair()
    base, model = base.to(dtype).train(training), model.to(dtype).train(training)
    x = torch.randn(3, 7, 8, dtype=dtype)
    torch.manual_seed(5)
    before = model(x)
    state = torch.get_rng_state()
    with disable_adapter(model):
        assert torch.equal(model(x), base(x))
        assert not model(x).requires_grad
        assert torch.equal(torch.get_rng_state(), state)  # no seed was drawn
    assert not torch.equal(before, base(x))
    torch.manual_seed(5)
    assert torch.equal(model(x), before)


def test_it_nests_and_restores_after_exceptions():
    base, model = pair(dropout=0.0)
    x = torch.randn(3, 7, 8)
    adapted, plain = model(x), base(x)
    with pytest.raises(ZeroDivisionError), disable_adapter(model):
        with disable_adapter(model.blocks[0]):
            assert torch.equal(model(x), plain)
        assert torch.equal(model(x), plain)
        _ = 1 / 0
    assert torch.equal(model(x), adapted)
    with disable_adapter(model.blocks[0]):
        assert not torch.equal(model(x), plain) and not torch.equal(model(x), adapted)
    assert torch.equal(model(x), adapted)


def test_code_that_reads_the_weight_gets_the_base_weight():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    base = copy.deepcopy(layer)
    fastlora.inject_lora(layer, ["linear1", "linear2", "out_proj"])
    randomise_adapters(layer)
    x = torch.randn(2, 3, 8)
    for grad in (True, False):  # without gradients the fused encoder layer runs
        with torch.set_grad_enabled(grad):
            with disable_adapter(layer):
                assert layer.linear1.weight is layer.linear1.original_linear.weight
                assert torch.equal(layer(x), base(x))
            assert not torch.allclose(layer(x), base(x))


def test_hooks_of_the_wrapped_layer_run_under_a_forced_backend_too():
    layer = LoRALinear(nn.Linear(4, 6), 2, backend="triton")
    nn.init.normal_(layer.lora_B)
    layer.original_linear.register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(3, 4)
    with disable_adapter(layer):
        assert torch.equal(layer(x), 2 * nn.functional.linear(x, layer.weight, layer.bias))
        assert str(fastlora.explain(layer, x)).startswith("torch/base: the adapter is disabled")


@pytest.mark.parametrize("kind", [nn.Linear, TokenLinear])
def test_token_objects(kind):
    layer = LoRALinear(kind(4, 6), 2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 4)
    expected = nn.functional.linear(x, layer.original_linear.weight, layer.bias)
    with disable_adapter(layer):
        assert torch.equal(layer(Tokens(x)).feats, expected)
        with pytest.raises(TypeError, match="input: expected a tensor"):
            layer("x")
    assert not torch.equal(layer(Tokens(x)).feats, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
def test_a_compiled_model_follows():
    torch.compiler.reset()
    base, model = pair(dropout=0.0)
    model.eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(3, 7, 8)
    adapted = model(x)
    torch.testing.assert_close(compiled(x), adapted)
    with disable_adapter(model):
        torch.testing.assert_close(compiled(x), base(x))
    torch.testing.assert_close(compiled(x), adapted)


@pytest.mark.slow
@needs_torch((2, 11), "the compiler does not trace this context manager")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch's own, while it traces
def test_a_compiled_function_may_contain_the_context():
    torch.compiler.reset()
    base, model = pair(dropout=0.0)
    x = torch.randn(3, 7, 8)
    adapted = model(x)

    @torch.compile(fullgraph=True, backend="eager")
    def reference(x):
        with disable_adapter(model):
            return model(x)

    torch.testing.assert_close(reference(x), base(x))
    assert torch.equal(model(x), adapted)
    with disable_adapter(model):
        torch.testing.assert_close(reference(x), base(x))
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), adapted)


def test_saving_and_loading_inside_are_unchanged(tmp_path):
    _, model = pair()
    fastlora.save_adapter(model, tmp_path / "a.safetensors")
    keys = model.state_dict().keys()
    with disable_adapter(model):
        assert model.state_dict().keys() == keys
        fastlora.save_adapter(model, tmp_path / "b.safetensors")
        fastlora.load_adapter(model, tmp_path / "a.safetensors")
    first, second = (load_file(tmp_path / f"{n}.safetensors") for n in "ab")
    assert first.keys() == second.keys() and len(first) == 16
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_merging_and_exporting_inside_are_refused():
    _, model = pair()
    x = torch.randn(3, 7, 8)
    with disable_adapter(model):
        for merge in (fastlora.merged_model, fastlora.merge_lora_weights):
            with pytest.raises(MergeError, match="the adapter is disabled"):
                merge(model)
        with pytest.raises(ExportError, match="its adapters are disabled"):
            fastlora.export(model, (x,))
        assert "disabled" in repr(model.blocks[0].attn.to_out)
    assert "disabled" not in repr(model)


def test_a_copy_made_inside_has_its_adapters():
    _, model = pair()
    model.eval()
    x = torch.randn(3, 7, 8)
    with disable_adapter(model):
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in twins:
        assert torch.equal(twin(x), model(x))


def test_a_model_without_adapters_is_refused():
    refusal = pytest.raises(InjectionError, match="there is nothing to disable")
    with refusal, disable_adapter(Decoder()):
        pass


def test_adapters_come_back_when_the_last_of_overlapping_contexts_ends():
    base, model = pair(dropout=0.0)
    x = torch.randn(3, 7, 8)
    adapted, plain = model(x), base(x)
    first, second = disable_adapter(model), disable_adapter(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(model(x), plain)  # the second is still open
    second.__exit__(None, None, None)
    assert torch.equal(model(x), adapted)
    third, part = disable_adapter(model), disable_adapter(model.blocks[0])
    third.__enter__()
    part.__enter__()
    third.__exit__(None, None, None)
    assert model.blocks[0].attn.to_out.disabled and not model.blocks[1].attn.to_out.disabled
    twin = copy.deepcopy(model)
    with disable_adapter(twin):
        assert torch.equal(twin(x), plain)
    assert torch.equal(twin(x), adapted)
    part.__exit__(None, None, None)
    assert torch.equal(model(x), adapted)


def test_async_tasks_and_threads_that_overlap_leave_the_adapters_on():
    base, model = pair(dropout=0.0)
    x = torch.randn(3, 7, 8)
    adapted, plain = model(x), base(x)

    async def compare(entered, leave):
        with disable_adapter(model):
            entered.set()
            await leave.wait()
            return model(x)

    async def overlap():
        (first_in, leave_first), (second_in, leave_second) = (
            (asyncio.Event(), asyncio.Event()) for _ in range(2)
        )
        first = asyncio.create_task(compare(first_in, leave_first))
        await first_in.wait()
        second = asyncio.create_task(compare(second_in, leave_second))
        await second_in.wait()
        leave_first.set()
        outputs = [await first]
        leave_second.set()
        return [*outputs, await second]

    assert all(torch.equal(y, plain) for y in asyncio.run(overlap()))
    assert torch.equal(model(x), adapted)

    outputs = []

    def repeat():
        for _ in range(50):
            with disable_adapter(model):
                outputs.append(model(x))

    threads = [threading.Thread(target=repeat) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 200 and all(torch.equal(y, plain) for y in outputs)
    assert torch.equal(model(x), adapted)


def test_an_unfinished_generator_restores_the_adapters_when_it_is_closed():
    _, model = pair(dropout=0.0)
    x = torch.randn(3, 7, 8)
    adapted = model(x)

    def references():
        with disable_adapter(model):
            yield model(x)

    unfinished = references()
    next(unfinished)
    with disable_adapter(model):
        unfinished.close()
        assert not torch.equal(model(x), adapted)
    assert torch.equal(model(x), adapted)


def test_overlapping_eval_modes_restore_the_training_modes():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    first, second = eval_mode(model), eval_mode(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not any(module.training for module in model.modules())
    second.__exit__(None, None, None)
    assert [module.training for module in model.modules()] == [True, True, False]
