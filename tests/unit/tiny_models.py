"""Tiny random models of several families and a tiny tokenizer, built in memory. Adding a family is adding a row."""

from collections.abc import Callable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 97
WIDTH = 32
_SHAPE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}
_GPT = {"n_embd": WIDTH, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_GROUPED, num_hidden_layers=4)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GROUPED, num_hidden_layers=3, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GROUPED, num_hidden_layers=4, sliding_window=32)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**_GROUPED, num_hidden_layers=4, head_dim=8, sliding_window=32)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**_SHAPE, num_hidden_layers=3)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**_GPT, n_layer=4)),
    # Its decoder layers return tuples, as all did before transformers 5.
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**_GPT, n_layer=3, rotary_dim=4)),
}


def randomized(model: PreTrainedModel) -> PreTrainedModel:
    """The model with weights large enough that logits differ by far more than the tolerances of the tests."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def tiny_model(family: str) -> PreTrainedModel:
    """The same weights on every call, whatever the global random state."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomized(FAMILIES[family]())


def tiny_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which `<|user|>` is a special token; with `bos`, it begins every text with `<s>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat in Paris", " Paris is the capital of France"] * 20, trainer)
    if bos:
        from tokenizers.processors import TemplateProcessing

        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        additional_special_tokens=["<|user|>"],
    )


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def blocks_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder blocks, told by nothing but the length of the list."""
    count = model.config.num_hidden_layers
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)


def clean_residuals(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """[L, T, D] outputs of the blocks, one prompt alone."""
    found = []
    hooks = [
        layer.register_forward_hook(lambda _m, _i, out: found.append((out[0] if isinstance(out, tuple) else out)[0]))
        for layer in blocks_of(model)
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return torch.stack(found)
