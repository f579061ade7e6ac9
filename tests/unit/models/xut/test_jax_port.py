"""Names and axes of the JAX port."""

import torch

from flowcore.models.xut.jax_port import is_jax, jax_to_reference


def test_names_axes_and_frequencies() -> None:
    tensors = {
        "in_patch.proj.kernel": torch.randn(2, 2, 4, 16),
        "in_patch.proj.bias": torch.randn(16),
        "backbone.enc_stacks.0.0.sa.qkv.kernel": torch.randn(16, 48),
        "backbone.enc_stacks.0.0.sa.rope.log_freqs": torch.tensor([0.5, 1.5]).view(2, 1, 1),
        "backbone.dec_stacks.1.0.xa_pre.norm.scale": torch.randn(16),
        "backbone.dec_stacks.1.0.mlp.w3.bias": torch.randn(16),
        "shared_adaln_ffw.norm.scale": torch.randn(16),
        "shared_adaln_ffw.fc2.kernel": torch.randn(64, 48),
        "time_emb.proj.kernel": torch.randn(16, 16),
        "out_patch.linear.bias": torch.randn(16),
        "class_token.embedding": torch.randn(3, 16),
        "addon_info_embs_proj_2.bias": torch.randn(16),
    }
    assert is_jax(tensors)
    converted = jax_to_reference(tensors)
    assert {name: tuple(tensor.shape) for name, tensor in converted.items()} == {
        "in_patch.proj.weight": (16, 4, 2, 2),
        "in_patch.proj.bias": (16,),
        "backbone.enc_blocks.0.0.attn.qkv.weight": (48, 16),
        "backbone.enc_blocks.0.0.attn.rope.freqs": (2, 2, 2),
        "backbone.dec_blocks.1.0.xattn_pre_norm.norm.weight": (16,),
        "backbone.dec_blocks.1.0.mlp.w3.bias": (16,),
        "shared_adaln_ffw.0.weight": (16,),
        "shared_adaln_ffw.3.weight": (48, 64),
        "time_emb.proj.0.weight": (16, 16),
        "out_patch.proj.bias": (16,),
        "class_token.weight": (3, 16),
        "addon_info_embs_proj.2.bias": (16,),
    }
    freqs = converted["backbone.enc_blocks.0.0.attn.rope.freqs"]
    assert freqs[:, 0].tolist() == [[0.5, 0.5], [1.5, 1.5]]
    assert freqs[:, 1].exp().abs().max() == 0
    assert converted["in_patch.proj.weight"][3, 1, 0, 1] == tensors["in_patch.proj.kernel"][0, 1, 1, 3]
