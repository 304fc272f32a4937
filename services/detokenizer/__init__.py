"""The detokenizer stage: semantic tokens to speech."""
