"""A picture of what a rollout made: one row for each condition, with its mask, its labels and the images in order."""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw


MASK_COLOUR = (255, 128, 0)
LABEL_COLOURS = ((0, 0, 0), (220, 60, 60), (60, 160, 240), (250, 210, 70), (120, 200, 120), (190, 110, 220))


def sample_grid(
    sources: torch.Tensor,
    masks: torch.Tensor,
    label_maps: torch.Tensor,
    images: torch.Tensor,
    rewards: torch.Tensor,
    cell: int = 128,
) -> Image.Image:
    """
    Lay out the groups of a rollout: the source with its mask overlaid, the label map, then the images of the group
    with their rewards.

    Args:
        sources (`torch.Tensor`):
            Sources of shape `(G, C, H, W)`, floats in [0, 1].
        masks (`torch.Tensor`):
            Masks of shape `(G, 1, H, W)`, 1 = repainted.
        label_maps (`torch.Tensor`):
            Integer label maps of shape `(G, 1, H, W)`.
        images (`torch.Tensor`):
            Images of shape `(G, M, C, H, W)`, floats in [0, 1].
        rewards (`torch.Tensor`):
            Rewards of the images, of shape `(G, M)`.
        cell (`int`, *optional*, defaults to `128`):
            Least width and height of each picture; small ones are enlarged by whole factors.

    Returns:
        `PIL.Image.Image`: the grid, in colour.
    """
    colours = torch.tensor(LABEL_COLOURS) / 255
    sources = sources.cpu().float().expand(-1, 3, -1, -1)
    masks, labels = masks.cpu().float(), label_maps.cpu()[:, 0]
    tint = torch.tensor(MASK_COLOUR).view(1, 3, 1, 1) / 255
    overlaid = torch.where(masks > 0, 0.6 * sources + 0.4 * tint, sources)
    labelled = torch.where(
        (labels > 0)[:, None], colours[labels % len(colours)].permute(0, 3, 1, 2), 0.35 * sources + 0.15 * masks
    )
    images = images.cpu().float().expand(-1, -1, 3, -1, -1)
    pictures = torch.cat([overlaid[:, None], labelled[:, None], images], dim=1)

    scale = max(1, -(-cell // pictures.shape[-1]))
    pictures = F.interpolate(pictures.flatten(0, 1), scale_factor=scale).unflatten(0, pictures.shape[:2])
    groups, columns, _, height, width = pictures.shape
    grid = pictures.permute(0, 3, 1, 4, 2).reshape(groups * height, columns * width, 3)
    picture = Image.fromarray((grid * 255).round().to(torch.uint8).numpy())
    draw = ImageDraw.Draw(picture)
    for group, row in enumerate(rewards.tolist()):
        for member, reward in enumerate(row):
            draw.text(((member + 2) * width + 3, group * height + 2), f"{reward:.3g}", fill=MASK_COLOUR)
    return picture
