"""Tiny random decoders, one per architecture family, and a tokenizer that fits all of them.

Every model is seeded, in evaluation mode, float32, on the CPU, with a vocabulary of 97 tokens (ids 0 to 3 are padding, begin, end and
unknown), room for 128 positions, and sizes that 128 does not divide. Weights are drawn wide (standard deviation 0.15 instead of 0.02) and
biases and norms are moved away from 0 and 1, so that attention patterns and gradients are not degenerate and a forgotten bias shows.
In llama, gpt_neox, opt, gpt2, bloom, falcon, gptj and mpt the second linear of the MLP has more than 128 inputs, so that a column loop in
blocks of 128 has a second block.
"""

import string

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

VOCAB = 97
POSITIONS = 128
WINDOW = 5  # sliding windows, in tokens: smaller than any sequence worth testing
PAD, BOS, EOS, UNK = 0, 1, 2, 3

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}

_SIZES = {
    "hidden_size": 36,
    "intermediate_size": 92,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,  # grouped-query attention wherever a family has it
    "max_position_embeddings": POSITIONS,
}

_CONFIGS = {
    # untied embeddings; three blocks; down_proj has 150 inputs: two blocks of columns
    "llama": _SIZES | {"num_hidden_layers": 3, "intermediate_size": 150, "tie_word_embeddings": False},
    "mistral": _SIZES | {"sliding_window": WINDOW, "head_dim": 6},
    # tied embeddings; bias on q, k, v
    "qwen2": _SIZES | {"tie_word_embeddings": True},
    # heads x head_dim = 60 is not the hidden size: q_proj and o_proj are not square
    "qwen3": _SIZES | {"head_dim": 10},
    # masks differ between blocks: sliding, full, sliding
    "gemma2": _SIZES
    | {
        "num_hidden_layers": 3,
        "head_dim": 6,
        "query_pre_attn_scalar": 6,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "tie_word_embeddings": True,
    },
    # masks and rotary embeddings differ between blocks
    "gemma3_text": _SIZES
    | {
        "num_hidden_layers": 3,
        "head_dim": 6,
        "query_pre_attn_scalar": 6,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    # q, k, v and gate, up are fused
    "phi3": _SIZES | {"original_max_position_embeddings": POSITIONS, "tie_word_embeddings": False},
    # norms after attention and MLP, not before
    "olmo2": _SIZES | {"tie_word_embeddings": False},
    # parallel residual; fused q, k, v; 132 inputs
    "gpt_neox": {
        "hidden_size": 30,
        "intermediate_size": 132,
        "num_hidden_layers": 2,
        "num_attention_heads": 5,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 2 / 3},
    },
    # learned positions, ReLU; projections around the blocks (word_embed_proj_dim) are linears of the decoder, but not of a block
    "opt": {
        "hidden_size": 36,
        "ffn_dim": 140,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": POSITIONS,
        "word_embed_proj_dim": 20,
    },
    # Conv1D: weights stored (in, out); 144 inputs
    "gpt2": {"n_embd": 36, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS},
    # ALiBi
    "bloom": {"hidden_size": 40, "n_layer": 2, "n_head": 5},
    # one key/value head; attention and MLP in parallel; own subclass of nn.Linear
    "falcon": {
        "hidden_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "max_position_embeddings": POSITIONS,
    },
    # partial rotary; untied head with bias
    "gptj": {"n_embd": 36, "n_layer": 2, "n_head": 3, "n_positions": POSITIONS, "rotary_dim": 4},
    # ALiBi, no biases
    "mpt": {"d_model": 36, "n_layers": 2, "n_heads": 4, "expansion_ratio": 4, "max_seq_len": POSITIONS},
    # experts are 3-D parameters, not linears
    "mixtral": _SIZES | {"intermediate_size": 44, "num_local_experts": 4, "num_experts_per_tok": 2},
    # experts in the first and last block, a dense MLP in the middle one
    "qwen3_moe": _SIZES
    | {
        "num_hidden_layers": 3,
        "head_dim": 10,
        "moe_intermediate_size": 20,  # grouped matrix products want rows of 16 bytes
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
}

MOE = ["mixtral", "qwen3_moe"]
FAMILIES = [family for family in _CONFIGS if family not in MOE]


def tiny(family, seed=0):
    """A tiny random decoder of one architecture family.

    The same family and seed give the same weights, whatever was drawn before, and the global random state is left alone.

    Args:
        family: one of `FAMILIES` or `MOE`, a `model_type` of transformers.
        seed: of the weights.

    Returns:
        The causal language model in evaluation mode, float32, on the CPU.

    Raises:
        KeyError: the family is not known here.
    """
    config = AutoConfig.for_model(family, **_TOKENS, **_CONFIGS[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return _widen(model, seed).eval()


def tiny_encoder(seed=0):
    """A tiny random BERT with a masked-language head: no decoder, to be refused with a clear message."""
    config = BertConfig(
        vocab_size=VOCAB,
        pad_token_id=PAD,
        hidden_size=36,
        intermediate_size=92,
        num_hidden_layers=2,
        num_attention_heads=6,
        max_position_embeddings=POSITIONS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForMaskedLM(config)
    return _widen(model, seed).eval()


def tiny_tokenizer():
    """A byte-level tokenizer of one token per character: 4 special tokens and 93 characters, `VOCAB` in all.

    Characters are printable ASCII (without ^, ` and ~) and the line feed; texts of these come back from decoding unchanged, any other byte
    becomes the unknown token. Nothing is added at the beginning or the end of a text. Byte-level because `AutoTokenizer` forces its own
    byte-level class on folders of some families (Qwen2), whatever the folder declares: ASCII text gets the same ids under either class.
    """
    kept = [c for c in string.digits + string.ascii_letters + string.punctuation + " \n" if c not in "^`~"]
    bytelevel = {" ": "\u0120", "\n": "\u010a"}  # how byte-level vocabularies write them
    words = ["<pad>", "<s>", "</s>", "<unk>", *(bytelevel.get(c, c) for c in kept)]
    assert len(words) == VOCAB
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )


def tiny_batches(count, batch=1, length=16, seed=0):
    """Random token batches without special tokens: `count` LongTensors (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(UNK + 1, VOCAB, (batch, length), generator=generator) for _ in range(count)]


@torch.no_grad()
def _widen(model, seed):
    """Redraw matrices with standard deviation 0.15 and add noise of 0.1 to vectors (biases, norms)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(0.15 * noise if parameter.ndim >= 2 else parameter + 0.1 * noise)
    return model
