"""Foreign models by name: oddities of torch.nn, and tiny models of transformers, timm and torchvision.

None is downloaded: they are built from configurations, with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .foreign_torch import CASES as TORCH

__all__ = ["CASES"]

# Sizes under all the names that configurations of transformers use for them.
SIZES = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "emb_dim", "attention_hidden_size",
                     "word_embed_proj_dim", "projection_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers",
                     "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads",
                     "decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim",
                     "d_inner", "n_inner"), 64),
    "num_key_value_heads": 2, "vocab_size": 99, "max_position_embeddings": 64, "n_positions": 64, "image_size": 32,
    "patch_size": 8, "d_kv": 8, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "type_vocab_size": 2, "num_experts": 4, "num_local_experts": 4,
    "moe_intermediate_size": 32, "kv_channels": 8,
}  # fmt: skip

TEXT, CAUSAL, SEQ2SEQ, IMAGE = "AutoModel", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "image"
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
SPEECH = {"conv_dim": [32, 32], "conv_kernel": [10, 3], "conv_stride": [5, 2], "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}  # fmt: skip
TRANSFORMERS: dict[str, tuple[str, dict]] = {
    **{name: (TEXT, {}) for name in (
        "albert", "bert", "camembert", "convbert", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra",
        "ernie", "esm", "fnet", "ibert", "layoutlm", "mobilebert", "mpnet", "mra", "nystromformer", "rembert",
        "roberta", "roformer", "squeezebert", "xlm-roberta", "yoso",
    )},
    "longformer": (TEXT, {"attention_window": 4}),
    "big_bird": (TEXT, {"attention_type": "original_full"}),
    "modernbert": (CAUSAL.replace("CausalLM", "MaskedLM"), {}),
    "xlnet": (TEXT, {"d_head": 8}),
    **{name: (CAUSAL, {}) for name in (
        "biogpt", "bloom", "cohere", "gemma", "gemma2", "gpt2", "gpt_bigcode", "gpt_neox",
        "granite", "llama", "mistral", "mixtral", "olmo", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3",
        "stablelm", "starcoder2", "xglm",
    )},
    "gpt_neo": (CAUSAL, {"attention_types": [[["global", "local"], 1]]}),
    "codegen": (CAUSAL, {"rotary_dim": 4}),
    "falcon": (CAUSAL, {}),
    "gptj": (CAUSAL, {"rotary_dim": 4}),
    "mamba": (CAUSAL, {"state_size": 4}),
    "mamba2": (CAUSAL, {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "rwkv": (CAUSAL, {}),
    "mpt": (CAUSAL, {}),
    **{name: (SEQ2SEQ, {}) for name in ("bart", "blenderbot", "m2m_100", "marian", "mbart", "mt5", "pegasus", "t5",
                                        "led", "longt5", "switch_transformers")},
    **{name: (IMAGE, {}) for name in ("beit", "deit", "dinov2", "vit", "vit_mae", "data2vec-vision", "ijepa")},
    "convnext": (IMAGE, {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}),
    "convnextv2": (IMAGE, {"hidden_sizes": [16, 32], "depths": [1, 1], "num_stages": 2}),
    "resnet": (IMAGE, {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}),
    "regnet": (IMAGE, {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8}),
    "swin": (IMAGE, {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 2, "window_size": 4,
                      "num_attention_heads": None}),
    "segformer": (IMAGE, {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2],
                          "decoder_hidden_size": 16}),
    "mobilevit": (IMAGE, {"hidden_sizes": [24, 32, 40], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64],
                          "num_attention_heads": 4, "image_size": 64}),
    "yolos": (IMAGE, {"image_size": [32, 32]}),
    "mobilenet_v2": (IMAGE, {"depth_multiplier": 0.25, "image_size": 64}),
    "poolformer": (IMAGE, {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}),
    "levit": (IMAGE, {"hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
                      "key_dim": [8, 8, 8], "image_size": 64, "patch_size": 16}),
    "pvt_v2": (IMAGE, {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 2, 2, 2]}),
    "clip": ("clip", {"text_config": TOWER | {"vocab_size": 99, "max_position_embeddings": 16, "eos_token_id": 2},
                      "vision_config": TOWER | {"image_size": 32, "patch_size": 8}, "projection_dim": 16}),
    "siglip": ("clip", {"text_config": TOWER | {"vocab_size": 99, "max_position_embeddings": 16},
                        "vision_config": TOWER | {"image_size": 32, "patch_size": 8}}),
    "whisper": ("whisper", {"num_mel_bins": 16, "max_source_positions": 10, "max_target_positions": 16}),
    **{name: ("speech", SPEECH) for name in ("wav2vec2", "hubert", "wavlm", "unispeech", "data2vec-audio")},
}  # fmt: skip


def of_transformers(name: str) -> tuple[nn.Module, dict]:
    import transformers

    kind, changes = TRANSFORMERS[name]
    known = transformers.AutoConfig.for_model(name)
    sizes = {key: value for key, value in SIZES.items() if key in known.attribute_map or key in known.to_dict()}
    sizes = {key: value for key, value in {**sizes, **changes}.items() if value is not None}
    config = transformers.AutoConfig.for_model(name, **sizes)
    auto = getattr(transformers, kind if kind.startswith("Auto") else "AutoModel")
    model = auto.from_config(config)
    words = torch.arange(3, 11).reshape(2, 4)
    inputs: dict[str, torch.Tensor] = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    if kind == SEQ2SEQ:
        inputs["decoder_input_ids"] = words[:, :3]
    if kind in (IMAGE, "clip"):
        size = config.vision_config.image_size if kind == "clip" else changes.get("image_size", 32)
        image = {"pixel_values": torch.randn(2, 3, *(size if isinstance(size, list) else (size, size)))}
        inputs = image | (inputs if kind == "clip" else {})
    if kind == "whisper":
        inputs = {"input_features": torch.randn(2, 16, 20), "decoder_input_ids": words}
    if kind == "speech":
        inputs = {"input_values": torch.randn(2, 400)}
    if name in ("mamba", "mamba2", "rwkv", "fnet"):
        inputs.pop("attention_mask")
    return model, inputs


TIMM: dict[str, dict] = {
    **{f"test_{name}": {} for name in (
        "byobnet", "coatnet", "convnext", "convnext2", "convnext3", "efficientnet", "efficientnet_evos",
        "efficientnet_gn", "efficientnet_ln", "mambaout", "maxvit", "nfnet", "resnet", "vit", "vit2", "vit3", "vit4",
        "vit_relpos",
    )},
    **{name: {"img_size": 64} for name in (
        "beit_base_patch16_224", "cait_xxs24_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224",
        "gmixer_12_224", "mixer_s32_224", "pit_ti_224", "resmlp_12_224", "swin_tiny_patch4_window7_224",
        "tnt_s_legacy_patch16_224", "vit_tiny_patch16_224", "xcit_nano_12_p16_224", "convit_tiny",
        "visformer_tiny", "gmlp_ti16_224",
        "efficientformerv2_s0", "coat_tiny", "volo_d1_224", "hiera_tiny_224",
    )},
    **{name: {} for name in (
        "convmixer_768_32", "crossvit_tiny_240", "cs3darknet_s", "cspdarknet53", "davit_tiny", "densenet121", "dla46_c",
        "efficientformer_l1", "tiny_vit_5m_224",
        "dpn48b", "edgenext_xx_small", "efficientvit_b0", "efficientvit_m0", "fastvit_t8",
        "fbnetc_100",
        "gcresnet33ts", "ghostnet_050", "halonet26t", "hardcorenas_a", "hgnetv2_b0", "hrnet_w18_small",
        "inception_next_atto", "lcnet_035", "levit_128s", "mambaout_femto", "mnasnet_small", "mobilenetv3_small_050",
        "mobilenetv4_conv_small_035", "mobileone_s0", "mobilevit_xxs", "mobilevitv2_050", "nf_regnet_b0", "nf_resnet26",
        "poolformerv2_s12", "pvt_v2_b0", "regnetx_002", "regnety_002", "repghostnet_050", "repvit_m0_9",
        "res2net50_14w_8s",
        "resnest14d", "resnet10t", "rexnet_100", "selecsls42", "skresnet18", "starnet_s1", "swiftformer_xs",
        "tf_efficientnet_b0", "tinynet_e", "xception41",
    )},
}  # fmt: skip

TINY = {  # fewer or narrower blocks than the smallest one published
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 64, "num_heads": 4},
    "cait_xxs24_224": {"depth": 2},
    "deit_tiny_distilled_patch16_224": {"depth": 2},
    "eva02_tiny_patch14_224": {"depth": 2, "img_size": 56},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 24, "img_size": 224},
    "tnt_s_legacy_patch16_224": {"depth": 2},
    "vit_tiny_patch16_224": {"depth": 2},
    "xcit_nano_12_p16_224": {"depth": 2},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 64), "num_heads": (1, 2, 4, 4)},
    "hiera_tiny_224": {"stages": (1, 1, 1, 1), "embed_dim": 16, "img_size": (64, 64)},
}  # fmt: skip


ONLY = {"crossvit_tiny_240": 240, "efficientformer_l1": 224, "levit_128s": 224, "tiny_vit_5m_224": 224}  # their size


def of_timm(name: str) -> tuple[nn.Module, tuple]:
    import timm

    options = TIMM[name] | TINY.get(name, {})
    size = options.get("img_size", ONLY.get(name, 64))
    size = size[0] if isinstance(size, tuple) else size
    model = timm.create_model(name, pretrained=False, num_classes=10, **options)
    if name.startswith("test_"):
        size = model.default_cfg["input_size"][-1]
    return model, (torch.randn(2, 3, size, size),)


TORCHVISION: dict[str, int] = {
    "efficientnet_b0": 64, "googlenet": 64, "mnasnet0_5": 64, "mobilenet_v2": 64, "mobilenet_v3_large": 64,
    "mobilenet_v3_small": 64, "regnet_y_400mf": 64, "resnet18": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64,
}  # fmt: skip


def of_torchvision(name: str) -> tuple[nn.Module, tuple]:
    from torchvision import models

    more = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = models.get_model(name, weights=None, num_classes=10, **more)
    return model, (torch.randn(2, 3, TORCHVISION[name], TORCHVISION[name]),)


def _of_extra(build: Callable) -> Callable[[], tuple[nn.Module, object]]:
    """A builder that makes timm and torchvision importable first."""

    def made():
        from tests.helpers import timm_case  # noqa: F401

        return build()

    return made


CASES: dict[str, Callable[[], tuple[nn.Module, object]]] = {
    **{f"torch.{name}": build for name, build in TORCH.items()},
    **{f"transformers.{name}": partial(of_transformers, name) for name in TRANSFORMERS},
    **{f"timm.{name}": _of_extra(partial(of_timm, name)) for name in TIMM},
    **{f"torchvision.{name}": _of_extra(partial(of_torchvision, name)) for name in TORCHVISION},
}
