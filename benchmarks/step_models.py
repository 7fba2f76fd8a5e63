"""Models with the sizes of known ones, random weights and random texts, of which a training step is
timed: they need neither files nor a network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

Batch = dict[str, Any]


class StepModel(NamedTuple):
    """A model, as it is timed.

    Attributes:
        make: makes it, anew each time.
        batch: texts in a batch.
        length: tokens in the longest text.
        writes: whether it predicts tokens, each a label, and not one of two classes for a text.
        has_biases: whether BitFit finds something to train.
    """

    make: Callable[[], Any]
    batch: int
    length: int
    writes: bool
    has_biases: bool = True


def _minilm() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=12
    )
    return BertForSequenceClassification(config)


def _bert_base() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig())


def _roberta_large() -> Any:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    return RobertaForSequenceClassification(config)


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config())


def _t5() -> Any:
    """T5-small, whose values are the config's own."""
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0))


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    return LlamaForCausalLM(config)


MODELS = {
    "minilm": StepModel(_minilm, 16, 128, writes=False),
    "bert-base": StepModel(_bert_base, 16, 128, writes=False),
    "roberta-large": StepModel(_roberta_large, 4, 128, writes=False),
    "llama": StepModel(_llama, 4, 128, writes=True, has_biases=False),
    "gpt2": StepModel(_gpt2, 4, 128, writes=True),
    "t5": StepModel(_t5, 4, 128, writes=True),
}


def make(name: str, batches: int, size: int | None = None) -> tuple[Any, list[Batch]]:
    """A model and as many batches, of ``size`` texts each where that is given."""
    import torch

    chosen = MODELS[name]
    model = chosen.make()
    vocabulary, texts = model.config.vocab_size, size or chosen.batch
    made = []
    for _ in range(batches):
        shape = (texts, chosen.length)
        lengths = torch.randint(chosen.length // 4, chosen.length + 1, (texts, 1))
        is_token = torch.arange(chosen.length) < lengths
        words = torch.randint(0, vocabulary, shape)
        labels = words.masked_fill(~is_token, -100)
        made.append({
            "input_ids": words,
            "attention_mask": is_token.long(),
            "labels": labels if chosen.writes else torch.randint(0, 2, (texts,)),
        })  # fmt: skip
    return model, made


def training_step(model: Any, rate: float = 1e-4) -> Callable[[Batch], None]:
    """Forward, backward and AdamW on a batch."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)

    def step(batch: Batch) -> None:
        model.train()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward(model: Any) -> Callable[[Batch], None]:
    """A forward without gradients on a batch."""
    import torch

    def call(batch: Batch) -> None:
        model.eval()
        with torch.no_grad():
            model(**batch)

    return call


def peft_task(model: Any) -> str:
    """PEFT's name for what a model does."""
    kinds = {"bert": "SEQ_CLS", "roberta": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}
    return kinds.get(model.config.model_type, "CAUSAL_LM")
