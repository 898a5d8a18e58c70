"""The peers of `gpu_step`: PyTorch in bf16 autocast with fused AdamW, from our parameters and on our batches.

GPT: `nanogpt_peer`'s (karpathy/nanoGPT train.py); BERT: `BertForPreTraining` of transformers. Both attend by
`scaled_dot_product_attention`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bertgpt_jax.batches.examples import Batch
from bertgpt_jax.batches.pipeline import prefetch
from bertgpt_jax.benchmarks.cpu_bert import torch_inputs
from bertgpt_jax.benchmarks.gpu_cases import RATE, STEPS
from bertgpt_jax.benchmarks.nanogpt_peer import loss_function
from bertgpt_jax.corpus.special import SpecialIds
from bertgpt_jax.errors import DataError
from bertgpt_jax.models.bert import BertConfig
from bertgpt_jax.models.gpt import GptConfig
from bertgpt_jax.shapes import Params
from bertgpt_jax.training.optim import AdamW
from bertgpt_jax.training.run_config import RunConfig
from bertgpt_jax.transfer import hf_bert
from bertgpt_jax.transfer.names import Name, linear

WHOLE_LAYERS = 12
"""Models of more layers are compiled layer by layer, which is done once for all: as one, they take torch minutes."""

Tensors = dict[str, Any]


class Torch:
    """A torch model with its batches.

    Args:
        name: `eager` or `compile`.
        config: of our run; its model, optimizer and threads are taken over.
        params: ours, to begin with.
        batches: n -> our batch on the host.
    """

    def __init__(self, name: str, config: RunConfig, params: Params, batches: Callable[[int], Batch]):
        self.name, self.facts = name, {}
        self._config, self._params, self._build = config, params, batches

    def start(self) -> None:
        """Makes the model and its first update, for which it is compiled."""
        import torch

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model, execution = self._config.model, self._config.execution
        self._half = execution.compute.dtype == "bfloat16"
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        make, inputs = (_gpt, gpt_inputs) if isinstance(model, GptConfig) else (_bert, bert_inputs)
        self._batches = prefetch(
            lambda n: self._pinned(inputs(self._build(n))), 0, STEPS, execution.data_threads, execution.prefetch
        )
        self._loss, self._parameters = make(model, self._params, self._device, self.name == "compile")
        self._params = None
        self._clip = self._config.stages[0].optimizer.clip_norm
        self._optimizer = make_adamw(self._parameters, self._config.stages[0].optimizer)
        begun = time.perf_counter()
        handle = self.update()
        self.wait(handle)
        self.facts["first_step"] = {"cold": time.perf_counter() - begun}
        self.facts["loss"] = float(handle[0])
        self.facts["compiled"] = _scope(model, self.name)
        for _ in range(2):
            self.wait(self.update())

    def _pinned(self, arrays: dict[str, np.ndarray]) -> Tensors:
        import torch

        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
        return {name: t.pin_memory() for name, t in tensors.items()} if self._device.type == "cuda" else tensors

    def update(self) -> tuple[Any, Any]:
        """Queues an update; (loss, what tells its end)."""
        import torch

        batch = {name: t.to(self._device, non_blocking=True) for name, t in next(self._batches).items()}
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._half):
            loss = self._loss(batch)
        loss.backward()
        if self._clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._device.type != "cuda":
            return loss.detach(), None
        event = torch.cuda.Event()
        event.record()
        return loss.detach(), event

    def wait(self, handle: tuple[Any, Any]) -> None:
        """Returns when the update is done."""
        if handle[1] is not None:
            handle[1].synchronize()

    def stop(self) -> None:
        """Lets go of the model and hands its memory back."""
        import torch

        if torch.cuda.is_available():
            self.facts["bytes"] = torch.cuda.max_memory_allocated()
        batches = getattr(self, "_batches", None)
        if batches is not None:
            batches.close()
        self._batches = self._loss = self._parameters = self._optimizer = self._params = None
        torch._dynamo.reset()  # compiled code holds on to what it was compiled for
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _scope(model: GptConfig | BertConfig, name: str) -> str:
    if name != "compile":
        return "no"
    return "whole" if model.num_layers <= WHOLE_LAYERS else "layer by layer"


def make_adamw(parameters: Mapping[str, Any], settings: AdamW) -> Any:
    """torch's fused AdamW with our settings: vectors are not decayed."""
    import torch

    groups = [
        {"params": [t for t in parameters.values() if (t.ndim > 1) == decays], "weight_decay": decay}
        for decays, decay in ((True, settings.weight_decay), (False, 0.0))
    ]
    return torch.optim.AdamW(groups, lr=RATE, betas=(settings.b1, settings.b2), eps=settings.eps, fused=True)


# ---------------------------------------------------------------- GPT


def gpt_inputs(batch: Batch) -> dict[str, np.ndarray]:
    """What the GPT reads."""
    return {name: batch[name].astype(np.int64) for name in ("tokens", "targets")}


def gpt_names() -> list[Name]:
    """The table of `nanogpt_peer.make_parameters`."""
    norms = [("layers/attention_norm", "{i}.first"), ("layers/feed_forward_norm", "{i}.second"), ("final_norm", "norm")]
    return [
        Name("token_embedding/table", "tokens.weight"),
        Name("position_embedding/table", "positions.weight"),
        *(Name(f"{ours}/{part}", f"{theirs}.{part}") for ours, theirs in norms for part in ("scale", "bias")),
        *(x for i, name in enumerate(("query", "key", "value")) for x in linear(
            f"layers/attention/{name}", "{i}.qkv", part=i
        )),
        *linear("layers/attention/output", "{i}.out", inputs=2),
        *linear("layers/feed_forward/up", "{i}.up"),
        *linear("layers/feed_forward/down", "{i}.down"),
    ]  # fmt: skip


def _gpt(model: GptConfig, params: Params, device: Any, compiled: bool) -> tuple[Callable[[Tensors], Any], Tensors]:
    """(batch -> loss, parameters); the padding of the vocabulary is a few words more, as in nanoGPT."""
    import torch

    tensors = {name: tensor.requires_grad_() for name, tensor in theirs(params, gpt_names(), device).items()}
    by_layer = compiled and model.num_layers > WHOLE_LAYERS
    loss = loss_function(model.model_dump(), torch.compile if by_layer else None)
    loss = torch.compile(loss) if compiled and not by_layer else loss
    return lambda batch: loss(tensors, batch["tokens"], batch["targets"]), tensors


# ---------------------------------------------------------------- BERT


def bert_inputs(batch: Batch) -> dict[str, np.ndarray]:
    """What `BertForPreTraining` reads."""
    return {name: array.astype(np.int64) for name, array in torch_inputs(batch).items()}


def _bert(model: BertConfig, params: Params, device: Any, compiled: bool) -> tuple[Callable[[Tensors], Any], Tensors]:
    """(batch -> loss, parameters); theirs has no rows that pad the vocabulary."""
    import torch
    from transformers import BertConfig as TheirConfig
    from transformers import BertForPreTraining

    tree = hf_bert.common_config(model, SpecialIds()) | {"max_position_embeddings": model.max_positions}
    with device:
        network = BertForPreTraining(TheirConfig(**tree)).train()
    tensors = theirs(params, hf_bert.names(model, SpecialIds()), device)
    for name in ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias"):
        tensors[name] = tensors[name][: model.vocab_size]
    found = network.load_state_dict(tensors, strict=False)
    if found.unexpected_keys or not set(found.missing_keys) <= set(hf_bert.shared(model)):
        raise DataError(f"BertForPreTraining lacks {found.unexpected_keys} or has more: {found.missing_keys}")
    run = network
    if compiled and model.num_layers > WHOLE_LAYERS:
        for part in (*network.bert.encoder.layer, network.cls):
            part.compile()
    elif compiled:
        run = torch.compile(network)
    return lambda batch: run(**batch).loss, dict(network.named_parameters())


def theirs(params: Params, rows: Sequence[Name], device: Any) -> Tensors:
    """Our parameters as torch tensors of the names and layouts that `rows` say."""
    import torch

    made: Tensors = {}
    for row in rows:
        array = params
        for key in row.ours.split("/"):
            array = array[key]
        for i, part in enumerate(array) if row.stacked else ((None, array),):
            part, name = np.array(part), row.theirs.format(i=i)
            if name not in made:
                made[name] = torch.empty(row.full_shape(part.shape), device=device)
            made[name][row.region(part.shape)] = torch.from_numpy(row.to_theirs(part)).to(device)
    return made
