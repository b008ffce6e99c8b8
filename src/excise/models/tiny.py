"""Tiny random models of every family, and tokenizers that need no download.

They share ids: `<pad>` 0, `<bos>` 1, `<eos>` 2, `<unk>` 3.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

from excise.core.errors import UserError, first_line, nearest
from excise.models.limits import check_sizes
from excise.models.spec import Model

ModelConfig = Any
"""A `transformers.PretrainedConfig`."""

FAMILIES: Final = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "olmo2",
    "mixtral",
)
"""Families that every model-facing function is tested on."""

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIALS: Final = (PAD, BOS, EOS, UNK)
"""Special tokens of all tokenizers made here, in the order of their ids."""
BYTE_VOCAB: Final = 256 + len(SPECIALS)
"""Vocabulary of `byte_tokenizer`."""

CHAT_TEMPLATE: Final = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '[' + message['role'] + ']\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
"""Chat template of `byte_tokenizer(chat=True)`; assistant turns carry the generation mark."""


def _shape(width: int, blocks: int) -> dict[str, Any]:
    """Return the sizes that all families but GPT-2 name alike."""
    heads = max(2, width // 16)
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "max_position_embeddings": 512,
    }


def _family(family: str, width: int, blocks: int) -> tuple[str, dict[str, Any]]:
    """Return (model type, fields) of a family: sizes, no dropout, windows that tiny texts reach."""
    shape = _shape(width, blocks)
    heads = shape["num_attention_heads"]
    grouped = shape | {"num_key_value_heads": max(1, heads // 2), "attention_dropout": 0.0}
    headed = grouped | {"head_dim": width // heads}
    gemma = headed | {
        "query_pre_attn_scalar": width // heads,
        "sliding_window": 64,
        "layer_types": [("sliding_attention", "full_attention")[i % 2] for i in range(blocks)],
    }
    no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    table: dict[str, tuple[str, dict[str, Any]]] = {
        "llama": ("llama", grouped),
        "mistral": ("mistral", headed | {"sliding_window": 256}),
        "qwen2": ("qwen2", grouped),
        "qwen3": ("qwen3", headed),
        "gemma2": ("gemma2", gemma),
        "gemma3": ("gemma3_text", gemma),
        "phi3": ("phi3", grouped | {"embd_pdrop": 0.0, "resid_pdrop": 0.0}),
        "gpt2": (
            "gpt2",
            {
                "n_embd": width,
                "n_layer": blocks,
                "n_head": heads,
                "n_inner": 4 * width,
                "n_positions": 512,
                "embd_pdrop": 0.0,
                "attn_pdrop": 0.0,
                "resid_pdrop": 0.0,
            },
        ),
        "gpt_neox": ("gpt_neox", shape | no_dropout),
        "olmo2": ("olmo2", grouped),
        "mixtral": ("mixtral", grouped | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    }
    return table[family]


def tiny_config(
    family: str, *, vocab: int = BYTE_VOCAB, width: int = 64, blocks: int = 2, **overrides: Any
) -> ModelConfig:
    """Return a configuration of a tiny model of one family, dropout 0.

    Args:
        family: One of `FAMILIES`.
        vocab: Number of tokens.
        width: Size of the residual stream; a multiple of 16, or 32.
        blocks: Number of blocks.
        **overrides: Fields of the family's own configuration.

    Returns:
        A `transformers` configuration.

    Raises:
        UserError: If the family is unknown, has no field of that name, or no model of those sizes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if family not in FAMILIES:
        raise UserError(f"there is no tiny model of '{family}'; {nearest(family, FAMILIES)}")
    kind, fields = _family(family, width, blocks)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    known = AutoConfig.for_model(kind, **ids)
    for name in overrides:
        if not hasattr(known, name):
            fixes = nearest(name, known.to_dict())
            raise UserError(f"the configuration of {family} has no field '{name}'; {fixes}")
    try:
        config = AutoConfig.for_model(kind, vocab_size=vocab, **(ids | fields | overrides))
        check_sizes(config, f"a tiny {family}")
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(config)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"there is no {family} of width {width}, {blocks} blocks and these settings: "
            f"{first_line(error)}"
        ) from None
    return config


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    vocab: int = BYTE_VOCAB,
    width: int = 64,
    blocks: int = 2,
    attention: str | None = None,
    **overrides: Any,
) -> Model:
    """Return a tiny random causal model in eval mode, float32, on the CPU.

    The global random state is left as it was; equal arguments give equal weights.

    Args:
        family: One of `FAMILIES`.
        seed: Seed of the weights.
        vocab: Number of tokens.
        width: Size of the residual stream.
        blocks: Number of blocks.
        attention: Attention implementation, `sdpa` or `eager`; None takes the library's choice.
        **overrides: Fields of the family's own configuration.

    Returns:
        A `transformers` model.

    Raises:
        UserError: As `tiny_config`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, vocab=vocab, width=width, blocks=blocks, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # of the CPU alone, where the model is made
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    return model.eval()


def _wrap(inner: Any, *, bos: bool, chat: bool = False) -> Any:
    """Return a `tokenizers.Tokenizer` as a `transformers` one, with or without a leading BOS."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    if bos:
        head = [(BOS, SPECIALS.index(BOS))]
        inner.post_processor = TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=head
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def word_tokenizer(words: Iterable[str]) -> Any:
    """Return a tokenizer with one token per word between white space.

    It puts `<bos>` first; words it does not know become `<unk>`; decoding joins words by a space.

    Args:
        words: Words, in the order of their ids (from 4 on); repetitions are dropped.

    Returns:
        The tokenizer.

    Raises:
        UserError: If a word is empty or holds white space.
    """
    from tokenizers import Tokenizer as Inner
    from tokenizers import pre_tokenizers
    from tokenizers.models import WordLevel

    ordered = dict.fromkeys([*SPECIALS, *words])
    for word in ordered:
        if not word or len(word.split()) != 1 or word.split()[0] != word:
            raise UserError(f"{word!r} is not a word; split texts at white space first")
    vocab = {word: i for i, word in enumerate(ordered)}
    inner = Inner(WordLevel(vocab, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(inner, bos=True)


def _byte_level(vocab: dict[str, int], merges: Sequence[tuple[str, str]] = ()) -> Any:
    """Return a byte-level BPE that round-trips every text."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, pre_tokenizers
    from tokenizers.models import BPE

    inner = Inner(BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(merges))
    inner.decoder = decoders.ByteLevel()
    return inner


def _byte_vocab() -> dict[str, int]:
    """Return specials and the 256 bytes in the alphabet of byte-level BPE."""
    from tokenizers.pre_tokenizers import ByteLevel

    symbols = [*SPECIALS, *sorted(ByteLevel.alphabet())]
    return {symbol: i for i, symbol in enumerate(symbols)}


def byte_tokenizer(*, bos: bool = False, chat: bool = False) -> Any:
    """Return a tokenizer with one token per UTF-8 byte: 256 bytes and four specials.

    Args:
        bos: Whether it puts `<bos>` before every text.
        chat: Whether it has a chat template (`CHAT_TEMPLATE`).

    Returns:
        The tokenizer; `decode(encode(text, add_special_tokens=False)) == text` for any text that
        does not spell a special token.
    """
    return _wrap(_byte_level(_byte_vocab()), bos=bos, chat=chat)


def train_bpe(texts: Iterable[str], vocab_size: int, *, bos: bool = True) -> Any:
    """Train a byte-level BPE tokenizer on texts.

    Args:
        texts: What to learn merges from.
        vocab_size: Number of tokens, specials and bytes included: at least `BYTE_VOCAB`.
        bos: Whether it puts `<bos>` before every text.

    Returns:
        The tokenizer; it round-trips every text.

    Raises:
        UserError: If `vocab_size` has no room for the bytes.
    """
    from tokenizers import Tokenizer as Inner
    from tokenizers import decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer

    if vocab_size < BYTE_VOCAB:
        raise UserError(f"a vocabulary of {vocab_size} cannot hold all bytes; use {BYTE_VOCAB}")
    inner = Inner(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return _wrap(inner, bos=bos)
