"""A model of transformers that takes no time and is nowhere else."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics


def save_tiny_llama(folder: Path, max_tokens: int = 64) -> None:
    """A Llama of random weights in bfloat16, embeddings tied, with a tokenizer, as transformers saves it."""
    import torch
    from tokenizers import Tokenizer as Rules
    from tokenizers import decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    rules = Rules(models.BPE())
    rules.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rules.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    rules.train_from_iterator([topics["assignment"], " terrible great"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=400,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=max_tokens,
                tie_word_embeddings=True,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
        model.to(torch.bfloat16).save_pretrained(folder)
