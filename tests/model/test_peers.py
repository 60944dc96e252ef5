"""With adapters at their initial values the trunk is timm's Swin and transformers' CLIP vision tower, frame by frame.

Both peers get the same random weights, through `load_pretrained`. In float64 the agreement is to the last digits; float32 is
held to the yardstick, with the peer in the place of the reference.
"""

import copy

import pytest
import torch
from safetensors.torch import save_file
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from stgcma_fast import ClipConfig, FastSTGCMA, ModelConfig, SwinConfig, load_pretrained
from stgcma_fast.reference import ReferenceSTGCMA
from tests.support.numerics import assert_close

IMPLEMENTATIONS = {"reference": ReferenceSTGCMA, "fast": FastSTGCMA}
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def clip_peer(backbone: ClipConfig) -> CLIPVisionModel:
    """transformers' CLIP vision tower of the same sizes."""
    config = CLIPVisionConfig(
        hidden_size=backbone.embed_dim,
        intermediate_size=4 * backbone.embed_dim,
        num_hidden_layers=backbone.layers,
        num_attention_heads=backbone.heads,
        image_size=backbone.image_size,
        patch_size=backbone.patch_size,
        hidden_act="quick_gelu",
    )
    return CLIPVisionModel(config)


def randomize(model: nn.Module) -> nn.Module:
    """Weights that keep activations near 1; norms, biases and bias tables that would show if they were mixed up."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "table" not in name and "position" not in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif "norm" in name and name.endswith("weight"):  # transformers' pre_layrnorm too
                parameter.normal_(1, 0.2)
            else:
                parameter.normal_(std=0.3)
    return model.eval()


@torch.no_grad()
def compare(peer, peer_features, backbone, rgb_of_audio, implementation, tmp_path):
    """Hold our features of both streams to the peer's, in float64 and in float32.

    Args:
        peer, peer_features: the other model, and its features of images ``[F, 3, height, width]``.
        backbone: ours.
        rgb_of_audio: the RGB image that gives the peer what a one-channel image gives us.
        implementation: which of ours.
        tmp_path: where the weights go.
    """
    frames = 2
    peer64 = copy.deepcopy(peer).double()
    # Written in float64, so that the audio weights, which are sums, are not rounded in between.
    save_file({key: value.contiguous() for key, value in peer64.state_dict().items()}, tmp_path / "model.safetensors")
    model = IMPLEMENTATIONS[implementation](ModelConfig(backbone, num_frames=frames)).double().eval()
    for name, parameter in model.named_parameters():
        if "gate_" in name:
            parameter.fill_(0.7)  # gates open, so that only the adapters' outputs of zero keep the streams apart
    load_pretrained(model, tmp_path / "model.safetensors")
    shapes = {"visual": (3, backbone.image_size, backbone.image_size), "audio": (1, *backbone.audio_shape)}
    images = {m: torch.randn(1, frames, *shape) for m, shape in shapes.items()}
    rgb = {"visual": images["visual"][0], "audio": rgb_of_audio(images["audio"][0].double().expand(-1, 3, -1, -1))}

    hi = {m: peer_features(peer64, x.double()) for m, x in rgb.items()}
    low = {m: peer_features(peer, x.float()) for m, x in rgb.items()}
    exact = model.features({m: x.double() for m, x in images.items()})
    fast = model.float().features(images)
    for m in images:
        assert hi[m].std() > 0.1
        assert (hi[m][0] - hi[m][1]).abs().max() > 0.1, "the frames are alike, so this proves little"
        torch.testing.assert_close(exact[m], hi[m], rtol=0, atol=1e-12)
        # Both round to float32 everywhere; the longest sums, of the last FFN layer, may be ordered otherwise.
        assert_close("features", m, fast[m], hi[m], low[m], reductions=(4 * hi[m].shape[-1],))


def compare_swin(backbone, implementation, tmp_path):
    peer = SwinTransformer(
        img_size=backbone.image_size, embed_dim=backbone.embed_dim, depths=backbone.depths, num_heads=backbone.num_heads
    )
    # Mean weights on one channel are RGB weights on a third of it in each channel.
    compare(
        randomize(peer),
        lambda model, x: model.forward_features(x).mean((1, 2)),
        backbone,
        lambda x: x / 3,
        implementation,
        tmp_path,
    )


def compare_clip(peer, backbone, implementation, tmp_path):
    # Summed weights on one channel are RGB weights on the same in each channel.
    compare(randomize(peer), lambda model, x: model(x).pooler_output, backbone, lambda x: x, implementation, tmp_path)


@each_implementation
def test_swin(implementation, tmp_path):
    """Shifted and unshifted windows, one merging, a last stage of one window."""
    compare_swin(SwinConfig(image_size=56, embed_dim=32, depths=(2, 2), num_heads=(1, 2)), implementation, tmp_path)


@each_implementation
def test_clip(implementation, tmp_path):
    """Audio as large as the image, so that its position table is the image's."""
    backbone = ClipConfig(64, 16, embed_dim=128, layers=2, heads=2, audio_frames=64, mel_bins=64)
    compare_clip(clip_peer(backbone), backbone, implementation, tmp_path)


@pytest.mark.slow
@each_implementation
def test_swin_large(implementation, tmp_path):
    """The published geometry at two blocks a stage: timm's swin_large_patch4_window7_224."""
    compare_swin(SwinConfig(depths=(2, 2, 2, 2)), implementation, tmp_path)


@pytest.mark.slow
@each_implementation
@pytest.mark.parametrize(("patch_size", "embed_dim"), [(16, 768), (14, 1024)])
def test_clip_full_width(implementation, patch_size, embed_dim, tmp_path):
    """The geometry of ViT-B/16 and ViT-L/14, with CLIP's heads of 64 channels, at two blocks."""
    backbone = ClipConfig(224, patch_size, embed_dim, layers=2, heads=embed_dim // 64, audio_frames=224, mel_bins=224)
    compare_clip(clip_peer(backbone), backbone, implementation, tmp_path)
