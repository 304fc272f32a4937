"""Names and shapes of every tensor in the released files, derived from the configs alone.

The random checkpoints are written from these tables, `kimia checkpoint inspect` compares files with them without
building a network, and the cost model counts parameters in them. The modules are built apart from them, so loading a
checkpoint that was written from here also tests the tables.
"""

from __future__ import annotations

from math import prod

from kimia.model.config import EncoderConfig, FlowConfig, LMConfig, VocoderConfig, VQConfig

Shape = tuple[int, ...]
Layout = dict[str, Shape]

TIME_FEATURES = 256  # sinusoids of the diffusion time, a constant of the flow model's code
SNAKE_TAPS = 12  # taps of the filters around every snake activation, a constant of BigVGAN's code
RESAMPLER_TAPS = 16  # of `resampler.kernel`, which the flow file carries and nobody reads
FLOW_PREFIX = "speech_model."


def parameters(layout: Layout) -> int:
    """Number of values in a layout."""
    return sum(prod(shape) for shape in layout.values())


def under(prefix: str, layout: Layout) -> Layout:
    """The layout with a prefix before every name."""
    return {prefix + name: shape for name, shape in layout.items()}


def linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> Layout:
    """A linear layer."""
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def layer_norm(name: str, width: int) -> Layout:
    """A LayerNorm with weight and bias."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


# ---- language model ---------------------------------------------------------------------------------------------


def decoder_layer(config: LMConfig, prefix: str) -> Layout:
    """One layer of the trunk or of the audio branch."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.kv_heads * config.head_dim
    return under(
        prefix,
        linear("self_attn.q_proj", hidden, hidden)
        | linear("self_attn.k_proj", kv, hidden)
        | linear("self_attn.v_proj", kv, hidden)
        | linear("self_attn.o_proj", hidden, hidden, bias=False)
        | linear("mlp.gate_proj", inner, hidden, bias=False)
        | linear("mlp.up_proj", inner, hidden, bias=False)
        | linear("mlp.down_proj", hidden, inner, bias=False)
        | {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)},
    )


def adaptor(config: LMConfig) -> Layout:
    """The adaptor from continuous features to the hidden size."""
    hidden = config.hidden_size
    return under(
        "model.vq_adaptor.layers.",
        linear("0", hidden, config.adaptor_input_dim) | linear("3", hidden, hidden) | layer_norm("4", hidden),
    )


def embeddings_and_heads(config: LMConfig) -> Layout:
    """What stands outside the layers: the embedding table, both norms, both heads."""
    table, norm = (config.vocab_size, config.hidden_size), (config.hidden_size,)
    return {
        "model.embed_tokens.weight": table,
        "model.norm.weight": norm,
        "lm_head.weight": table,
        "mimo_output.weight": table,
        "model.mimo_norm.weight": norm,
    }


def layer_prefixes(config: LMConfig) -> list[str]:
    """Names of all layers, the trunk's before the audio branch's."""
    trunk = [f"model.layers.{index}." for index in range(config.layers)]
    return trunk + [f"model.mimo_layers.{index}." for index in range(config.mimo_layers)]


def language_model(config: LMConfig) -> Layout:
    """All tensors of the language model, without the rotary leftovers."""
    layout = embeddings_and_heads(config) | adaptor(config)
    for prefix in layer_prefixes(config):
        layout |= decoder_layer(config, prefix)
    return layout


# ---- encoders ---------------------------------------------------------------------------------------------------


def _encoder_stem(config: EncoderConfig) -> Layout:
    width = config.d_model
    return {
        "conv1.weight": (width, config.mel_bins, 3),
        "conv1.bias": (width,),
        "conv2.weight": (width, width, 3),
        "conv2.bias": (width,),
        "embed_positions.weight": (config.max_positions, width),
    }


def encoder_layer(config: EncoderConfig, prefix: str) -> Layout:
    """One Whisper encoder layer."""
    width = config.d_model
    return under(
        prefix,
        linear("self_attn.k_proj", width, width, bias=False)
        | linear("self_attn.v_proj", width, width)
        | linear("self_attn.q_proj", width, width)
        | linear("self_attn.out_proj", width, width)
        | layer_norm("self_attn_layer_norm", width)
        | linear("fc1", config.ffn_dim, width)
        | linear("fc2", width, config.ffn_dim)
        | layer_norm("final_layer_norm", width),
    )


def whisper_encoder(config: EncoderConfig) -> Layout:
    """All tensors of the Whisper encoder (in the file under `model.encoder.` or `encoder.`)."""
    layout = _encoder_stem(config)
    for index in range(config.layers):
        layout |= encoder_layer(config, f"layers.{index}.")
    return layout | layer_norm("layer_norm", config.d_model)


def vq_tokenizer(config: VQConfig) -> Layout:
    """All tensors of the VQ tokenizer, without the codebook's training state."""
    encoder = config.encoder
    layout = _encoder_stem(encoder)
    for index in range(config.quantize_position):
        layout |= encoder_layer(encoder, f"layers.{index}.")
    positions = encoder.max_positions // config.pooling_kernel
    return layout | {
        "codebook.weight": (config.codebook_size, encoder.d_model),
        "embed_positions2.weight": (positions, encoder.d_model),
    }


def codebook_training_state(config: VQConfig) -> Layout:
    """The codebook's moving averages, which the release carries and serving ignores."""
    return {"ema_count": (config.codebook_size,), "ema_weight": (config.codebook_size, config.encoder.d_model)}


# ---- detokenizer ------------------------------------------------------------------------------------------------


def flow_block(config: FlowConfig, prefix: str) -> Layout:
    """One block of the flow-matching transformer."""
    width = config.hidden_size
    return under(
        prefix,
        linear("attn.qkv", 3 * width, width)
        | linear("attn.proj", width, width)
        | linear("mlp.fc1", config.mlp_hidden, width)
        | linear("mlp.fc2", width, config.mlp_hidden)
        | linear("adaLN_modulation.1", 6 * width, width),
    )


def flow(config: FlowConfig) -> Layout:
    """All tensors of the flow-matching model (in the file under `speech_model.`)."""
    width = config.hidden_size
    layout = (
        linear("t_embedder.mlp.0", width, TIME_FEATURES)
        | linear("t_embedder.mlp.2", width, width)
        | {"semantic_token_embedding.weight": (config.audio_codes + 1, width)}
        | linear("input_linear", width, config.mel_bins)
    )
    if config.position_embedding == "learnable":
        layout["position_embedding.weight"] = (config.max_seq_len + 1, width)
    elif config.position_embedding == "sincos":
        layout["position_embedding._float_tensor"] = (1,)
    for index in range(config.depth):
        layout |= flow_block(config, f"blocks.{index}.")
    return (
        layout
        | linear("final_layer.linear", config.mel_bins, width)
        | linear("final_layer.adaLN_modulation.1", 2 * width, width)
    )


def stage_channels(config: VocoderConfig) -> list[int]:
    """Channels before the first and after each upsampling stage."""
    return [config.initial_channels >> stage for stage in range(len(config.upsample_rates) + 1)]


def _activation(config: VocoderConfig, name: str, channels: int) -> Layout:
    layout: Layout = {f"{name}.act.alpha": (channels,)}
    if config.activation == "snakebeta":
        layout[f"{name}.act.beta"] = (channels,)
    taps = (1, 1, SNAKE_TAPS)
    return layout | {f"{name}.upsample.filter": taps, f"{name}.downsample.lowpass.filter": taps}


def _convolution(name: str, shape: Shape, bias: int | None) -> Layout:
    return {f"{name}.weight": shape} | ({f"{name}.bias": (bias,)} if bias else {})


def _residual_block(config: VocoderConfig, name: str, channels: int, kernel: int, dilations: int) -> Layout:
    layout: Layout = {}
    for branch in ("convs1", "convs2"):
        for index in range(dilations):
            layout |= _convolution(f"{name}.{branch}.{index}", (channels, channels, kernel), channels)
    for index in range(2 * dilations):
        layout |= _activation(config, f"{name}.activations.{index}", channels)
    return layout


def vocoder(config: VocoderConfig) -> Layout:
    """All tensors of BigVGAN with weight norm folded (`weight`); `weight_norm_names` lists what the file splits."""
    channels = stage_channels(config)
    layout = _convolution("conv_pre", (channels[0], config.mel_bins, 7), channels[0])
    for stage, kernel in enumerate(config.upsample_kernels):
        shape = (channels[stage], channels[stage + 1], kernel)  # transposed: inputs first
        layout |= _convolution(f"ups.{stage}.0", shape, channels[stage + 1])
    kinds = list(zip(config.resblock_kernels, config.resblock_dilations, strict=True))
    for stage, width in enumerate(channels[1:]):
        for kind, (kernel, dilations) in enumerate(kinds):
            name = f"resblocks.{stage * len(kinds) + kind}"
            layout |= _residual_block(config, name, width, kernel, len(dilations))
    layout |= _activation(config, "activation_post", channels[-1])
    return layout | _convolution("conv_post", (1, channels[-1], 7), 1 if config.bias_at_final else None)


def weight_normed(layout: Layout) -> Layout:
    """A folded vocoder layout as the release stores it: each `weight` split into `weight_g` and `weight_v`."""
    split: Layout = {}
    for name, shape in layout.items():
        if name.endswith(".weight"):
            split[name + "_g"] = (shape[0],) + (1,) * (len(shape) - 1)
            split[name + "_v"] = shape
        else:
            split[name] = shape
    return split
