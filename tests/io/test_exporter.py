"""Exported models run without fastlora and compute what the model computes; the model does not change."""

import copy
import importlib.util
import io
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fastlora
from fastlora import (
    ExportError,
    LoRAConfig,
    LoRALinear,
    MergeError,
    export,
    get_lora_params,
    inject_lora,
)
from tests.support.models import Decoder, randomise_adapters
from tests.support.tolerance import assert_close, assert_differs
from tests.support.versions import needs_torch

# torch's own, while it traces, pickles and converts
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
]

ONNX = pytest.mark.skipif(
    any(importlib.util.find_spec(n) is None for n in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not all installed",
)
FORMATS = ["torch.export", "torchscript", pytest.param("onnx", marks=ONNX)]


def adapted(dropout=0.5, model=None):
    model = Decoder() if model is None else model
    inject_lora(model, lambda path, _: "to_" in path or "mlp" in path, rank=4, dropout=dropout)
    randomise_adapters(model)
    return model


def runner(path, format):
    """A function that runs the file at `path` without fastlora."""
    if format == "torch.export":
        return torch.export.load(path).module()
    if format == "torchscript":
        return torch.jit.load(path)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def call(*inputs):
        feed = dict(zip(names, (x.numpy() for x in inputs), strict=True))
        return torch.from_numpy(session.run(None, feed)[0])

    return call


@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch's export
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("merged", [True, False])
def test_a_file_computes_what_the_model_computes_for_any_batch(tmp_path, format, merged):
    model = adapted().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    file = tmp_path / "model.pt2"
    export(model, (torch.randn(3, 7, 8),), file, format=format, merged=merged)
    assert [f.name for f in tmp_path.iterdir()] == ["model.pt2"]
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert sum(type(m) is LoRALinear for m in model.modules()) == 8
    call = runner(file, format)
    model.eval()
    for batch in (3, 5, 1):
        x = torch.randn(batch, 7, 8)
        torch.testing.assert_close(call(x), model(x).detach())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("merged", [True, False])
def test_every_kind_of_layer_and_update_is_exported(tmp_path, format, merged):
    def make():
        torch.manual_seed(0)
        conv, embedding = nn.Conv1d(8, 8, 3, padding=1), nn.Embedding(16, 8)
        return nn.Sequential(embedding, conv, nn.Linear(8, 6), nn.Linear(6, 4))

    def settings(path, _):
        variant = {"2": {"use_dora": True}, "3": {"init_lora_weights": "olora"}}.get(path, {})
        return LoRAConfig(rank=2, **variant)

    model = make()
    inject_lora(model, LoRAConfig(settings, kinds=("linear", "conv", "embedding")))
    with torch.no_grad():
        for parameter in get_lora_params(model):
            parameter.add_(torch.randn(parameter.shape), alpha=0.3)
    ids = torch.arange(16).view(2, 8)
    file = tmp_path / "model"
    export(model, (ids,), file, format=format, merged=merged, dynamic_batch=False)
    expected = model.eval()(ids).detach()
    torch.testing.assert_close(runner(file, format)(ids), expected)
    assert_differs(expected, make()(ids))


@pytest.mark.parametrize("merged", [True, False])
def test_an_exported_program_is_plain_and_has_the_models_names(merged):
    program = export(adapted(), (torch.randn(3, 7, 8),), merged=merged)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not any("addmm_" in name or "fastlora" in name or "wrap" in name for name in called)
    assert any(key.endswith("to_qkv.lora_A") for key in program.state_dict) is not merged


def test_a_trace_accepts_named_inputs():
    model = adapted()
    x = torch.randn(3, 7, 8)
    script = export(model, (), format="torchscript", kwargs={"x": x + 1}, merged=False)
    torch.testing.assert_close(script(x), model.eval()(x).detach())


@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_has_no_autograd_function_and_no_warnings(grad):
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        script = export(adapted(), (torch.randn(3, 7, 8),), format="torchscript", merged=False)
    buffer = io.BytesIO()
    torch.jit.save(script, buffer)
    assert "PythonOp" not in str(script.inlined_graph)


def test_a_forced_backend_does_not_affect_the_exported_program():
    model = adapted()
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.backend = "triton"
    x = torch.randn(3, 7, 8)
    got = export(model, (x,), merged=False).module()(x)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.backend = "torch"
    torch.testing.assert_close(got, model.eval()(x))


def test_sixteen_bit_weights_with_float32_adapters():
    model = adapted(model=Decoder().bfloat16())
    x = torch.randn(3, 7, 8).bfloat16()
    program = export(model, (x,), merged=False)
    assert program.module()(x).dtype == torch.bfloat16
    exact = copy.deepcopy(model).double().eval()(x.double())
    assert_close(program.module()(x), model.eval()(x), exact)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning"
)  # the attention's own checks of shapes
@pytest.mark.parametrize("format", FORMATS)
def test_a_transformer_encoder_uses_no_fused_operator(tmp_path, format):
    torch.manual_seed(3)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    inject_lora(model, ["linear1", "linear2"])
    randomise_adapters(model)
    x = torch.randn(3, 5, 16)
    result = export(model, (x,), tmp_path / "m", format=format, merged=False)
    if format == "torch.export":
        assert "_transformer_encoder_layer_fwd" not in str(result.graph)
    if format == "torchscript":
        assert "_transformer_encoder_layer_fwd" not in str(result.inlined_graph)
    assert torch.backends.mha.get_fastpath_enabled()
    torch.testing.assert_close(runner(tmp_path / "m", format)(x), model.eval()(x).detach())


def test_a_wrapped_layer_with_hooks_and_one_whose_weight_is_read():
    model = adapted(model=Decoder())
    hooked = model.blocks[0].attn.to_out.original_linear
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(3, 7, 8)
    torch.testing.assert_close(export(model, (x,), merged=False).module()(x), model.eval()(x))
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    layer = LoRALinear(attention.out_proj, rank=2)
    attention.out_proj = layer
    nn.init.normal_(layer.lora_B)
    program = export(attention, (x, x, x), merged=False)
    torch.testing.assert_close(program.module()(x, x, x)[0], attention.eval()(x, x, x)[0])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(4, 6)

    def forward(self, x, *, other, scale=None):
        y = self.to_q(x["a"]) + self.to_q(other[0])
        return y if scale is None else y * scale


@pytest.mark.parametrize("merged", [True, False])
def test_nested_and_named_inputs_have_a_dynamic_batch(merged):
    model = adapted(model=TwoInputs())

    def inputs(n):
        return {"a": torch.randn(n, 4)}, {
            "other": [torch.randn(n, 4)],
            "scale": torch.tensor(2.0),
        }

    x, named = inputs(3)
    call = export(model, (x,), kwargs=named, merged=merged).module()
    x, named = inputs(6)
    torch.testing.assert_close(call(x, **named), model.eval()(x, **named))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("format", ["torch.export", pytest.param("onnx", marks=ONNX)])
def test_a_language_model_of_transformers(tmp_path, format):
    transformers = pytest.importorskip("transformers")
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.LlamaConfig(
        vocab_size=64, num_key_value_heads=2, use_cache=False, **shape
    )
    model = transformers.LlamaForCausalLM(config)
    inject_lora(model, ["q_proj", "v_proj"], rank=4)
    randomise_adapters(model)
    tokens = torch.randint(0, 64, (2, 12))
    file = tmp_path / "m.pt2"
    export(model, (), file, format=format, merged=False, kwargs={"input_ids": tokens})
    tokens = torch.randint(0, 64, (5, 12))
    expected = model.eval()(input_ids=tokens).logits.detach()
    if format == "onnx":
        got = runner(file, format)(tokens)
    else:
        got = runner(file, format)(input_ids=tokens).logits
    torch.testing.assert_close(got, expected)


def test_dynamic_shapes_and_a_fixed_batch():
    model = adapted()
    length = torch.export.Dim("length", min=2, max=64)
    call = export(model, (torch.randn(1, 7, 8),), dynamic_shapes=({1: length},)).module()
    x = torch.randn(1, 9, 8)
    torch.testing.assert_close(call(x), model.eval()(x))
    fixed = export(model, (torch.randn(1, 7, 8),), dynamic_batch=False).module()
    assert fixed(torch.randn(1, 7, 8)).shape == (1, 7, 5)
    with pytest.raises((AssertionError, RuntimeError)):  # the latter before torch 2.7
        fixed(torch.randn(2, 7, 8))


@needs_torch((2, 7), "a model's own buffers that are None are miscounted")
def test_a_single_layer_and_a_model_without_adapters():
    layer = LoRALinear(nn.Linear(4, 6), rank=2)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 4)
    for merged in (True, False):
        torch.testing.assert_close(export(layer, (x,), merged=merged).module()(x), layer(x))
    assert type(layer) is LoRALinear
    plain = nn.Linear(4, 6)
    assert torch.equal(export(plain, (x,)).module()(x), plain(x))


@pytest.mark.slow
def test_a_file_loads_without_fastlora(tmp_path):
    export(adapted(), (torch.randn(3, 7, 8),), tmp_path / "model.pt2", merged=False)
    export(
        adapted(), (torch.randn(3, 7, 8),), tmp_path / "m.pt", format="torchscript", merged=False
    )
    program = """
import sys, warnings
sys.modules["fastlora"] = None
import torch
x = torch.ones(2, 7, 8)
assert torch.export.load("model.pt2").module()(x).shape == torch.jit.load("m.pt")(x).shape == (2, 7, 5)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tensorrt"}, "format: expected one of torch.export, onnx, torchscript, got"),
        ({"args": torch.ones(2, 8)}, "args: expected a tuple of inputs, got Tensor"),
        ({"args": (torch.ones(1, 7, 8),)}, "x: expected a first dimension of 2 or more"),
        (
            {"args": (), "kwargs": {"x": [torch.ones(0, 8)]}},
            r"x\[0\]: expected a first",
        ),
        ({"kwargs": {"x": torch.ones(2, 7, 8)}}, "do not fit the model's forward: multiple values"),
        ({"format": "torchscript", "kwargs": {"x": 1}}, "kwargs: a trace accepts args or kwargs"),
        ({"format": "torchscript", "dynamic_shapes": ({},)}, "dynamic_shapes: a trace has no"),
    ],
)
def test_what_cannot_work_is_refused(arguments, message):
    with pytest.raises(ExportError, match=message):
        export(adapted(), **{"args": (torch.ones(2, 7, 8),), **arguments})


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ExportError, match=r"needs onnx and onnxscript: pip install onnx onnxscript"
    ):
        export(adapted(), (torch.ones(2, 7, 8),), format="onnx")


def test_tied_weights_are_refused_merged_and_exported_unmerged():
    model = Decoder()
    inject_lora(model, ["to_out"])
    randomise_adapters(model)
    model.upsample[0]["out_layers"].weight = model.blocks[0].attn.to_out.original_linear.weight
    x = torch.randn(2, 7, 8)
    with pytest.raises(MergeError, match="tied"):
        export(model, (x,))
    torch.testing.assert_close(export(model, (x,), merged=False).module()(x), model.eval()(x))


@pytest.mark.filterwarnings("ignore")
def test_accelerated_layers_are_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"])
    )
    fastlora.accelerate(model)
    with pytest.raises(ExportError, match=r"call fastlora.restore\(model\) first"):
        export(model, (torch.ones(2, 4),))
    fastlora.restore(model)
    assert export(model.merge_and_unload(), (torch.ones(2, 4),)) is not None


def test_a_file_that_cannot_be_written_keeps_the_old_one(tmp_path, monkeypatch):
    with pytest.raises(ExportError, match="path: cannot write"):
        export(adapted(), (torch.randn(2, 7, 8),), tmp_path / "none" / "m.pt2")
    file = tmp_path / "m.pt2"
    file.write_text("old")

    def full(program, path):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(ExportError, match="disk full"):
        export(adapted(), (torch.randn(2, 7, 8),), file)
    assert [f.name for f in tmp_path.iterdir()] == ["m.pt2"] and file.read_text() == "old"


@ONNX
def test_onnx_with_its_weights_in_a_second_file(tmp_path, monkeypatch):
    from torch.onnx import ONNXProgram

    save = ONNXProgram.save
    monkeypatch.setattr(ONNXProgram, "save", lambda self, f: save(self, f, external_data=True))
    model = adapted()
    export(model, (torch.randn(2, 7, 8),), tmp_path / "m.onnx", format="onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    x = torch.randn(4, 7, 8)
    got = runner(tmp_path / "m.onnx", "onnx")(x)
    torch.testing.assert_close(got, model.eval()(x).detach())
    (tmp_path / "m.onnx").chmod(0o600)

    def killed(source, place, replace=os.replace):
        moves_data = Path(place) == tmp_path / "m.onnx.data"
        if moves_data:  # never an old model beside new weights
            assert not (tmp_path / "m.onnx").exists()
        replace(source, place)
        if moves_data:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            export(model, (torch.randn(2, 7, 8),), tmp_path / "m.onnx", format="onnx")
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx.data"]
    (tmp_path / "m.onnx").touch(0o600)
    export(model, (torch.randn(2, 7, 8),), tmp_path / "m.onnx", format="onnx")
    assert (tmp_path / "m.onnx").stat().st_mode & 0o777 == 0o600
