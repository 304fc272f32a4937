"""The tokenizer stage: sound to semantic tokens and continuous features."""
