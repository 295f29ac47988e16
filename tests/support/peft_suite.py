"""A pytest plugin that runs PEFT's own tests with `fastlora.accelerate` switched on: `pytest -p peft_suite`.

Every model into which PEFT injects an adapter, the first or a later one, goes through `accelerate`. The summary says how many forwards
took the fused path, and a run without one fails. docs/reliability.md has the command.
"""

from functools import wraps

import pytest
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner

import fastlora
from fastlora.peft import layer as peft_layer


class FusedPath:
    """Accelerates what PEFT builds, and counts the fused forwards and the tests with fused forwards."""

    def __init__(self) -> None:
        self.layers = self.forwards = self.tests = 0

    def install(self, patch: pytest.MonkeyPatch) -> None:
        inject, linear = BaseTuner.inject_adapter, peft_layer.lora_linear

        @wraps(inject)
        def inject_and_accelerate(tuner, model, *args, **kwargs):
            inject(tuner, model, *args, **kwargs)
            if any(isinstance(module, LoraLayer) for module in model.modules()):
                self.layers += fastlora.accelerate(model).changed

        @wraps(linear)
        def counted(*args, **kwargs):
            self.forwards += 1
            return linear(*args, **kwargs)

        patch.setattr(BaseTuner, "inject_adapter", inject_and_accelerate)
        patch.setattr(peft_layer, "lora_linear", counted)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self):
        before = self.forwards
        result = yield
        self.tests += self.forwards > before
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self.forwards == 0 and not session.config.option.collectonly:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        terminalreporter.section("fastlora")
        terminalreporter.line(
            f"{self.forwards} forwards took the fused path, in {self.tests} tests; "
            f"{self.layers} layers were accelerated"
        )
        if self.forwards == 0:
            terminalreporter.line("FAILED: no forward took the fused path", red=True)


def pytest_configure(config):
    patch = pytest.MonkeyPatch()
    config.add_cleanup(patch.undo)
    fused = FusedPath()
    fused.install(patch)
    config.pluginmanager.register(fused, "fastlora-fused-path")
