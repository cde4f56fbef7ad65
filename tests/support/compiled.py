"""An expert layer, and a language model full of them, compiled without a graph break against eager.

Run by test_expert_linear.py, as `python -m tests.support.compiled`.
"""

import torch
from torch import Tensor

from tests.support.banks import SITE, fill, inputs, make_bank, some_gates
from tests.support.tiny import tiny_llava


def layer() -> None:
    bank = make_bank(tiny_llava()[0], targets=(SITE,))
    fill(bank)
    x, gates = torch.randn(4, 3, 32, requires_grad=True), some_gates(bank).requires_grad_()

    def run(site) -> list[Tensor]:
        bank.set_gates(gates)
        out = site(x)
        grads = torch.autograd.grad(out.square().sum(), [x, gates, *bank.parameters()])
        return [out, *grads]

    eager = run(bank.sites[SITE])
    compiled = torch.compile(bank.sites[SITE], backend="aot_eager", fullgraph=True)
    for _ in range(2):  # the second forward has new gates
        torch.testing.assert_close(run(compiled), eager)


def language_model() -> None:
    model, processor = tiny_llava()
    bank = make_bank(model)
    fill(bank)

    def run() -> list[Tensor]:
        gates = some_gates(bank).requires_grad_()
        bank.set_gates(gates, torch.arange(4))
        logits = model(**inputs(processor)).logits
        grads = torch.autograd.grad(logits.square().mean(), [gates, *bank.parameters()])
        return [logits, *grads]

    eager = run()
    model.model.language_model.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(), eager, atol=1e-6, rtol=1e-4)


if __name__ == "__main__":
    torch.manual_seed(0)
    layer()
    language_model()
