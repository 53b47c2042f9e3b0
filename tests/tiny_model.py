"""A model folder that any test can train in seconds: random weights, byte vocabulary."""

import hashlib
import json
from pathlib import Path

TINY_MODEL_ID = "tests/tiny-random"


def make_tiny_model(folder: Path, *, seed: int = 0, embedding_std: float = 0.15) -> Path:
    """A random Llama of about 100k parameters with a byte tokenizer and a chat template.

    The usual initialisation hardly learns at this size; wider embeddings do.
    """
    import torch  # noqa: PLC0415 - tests of other packages must not load it
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import (  # noqa: PLC0415
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|start|>", "<|end|>"]
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|start|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|start|>{% endif %}"
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.nn.init.normal_(embeddings.weight, std=embedding_std)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    entry = {
        "id": TINY_MODEL_ID,
        "aliases": ["tiny"],
        "sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "context_length": config.max_position_embeddings,
        "licence": "Apache-2.0",
    }
    (folder / "model.json").write_text(json.dumps(entry, indent=2))
    return folder
