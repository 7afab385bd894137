"""The colour scale of every map and difference picture."""

from __future__ import annotations

import torch
from torch import Tensor

# Every fifth entry of matplotlib's cividis (CC0), the same table as in web/heatmap.js. It reads the same with and without
# colour vision; linear between them, it stays within 4/255 of the full table.
_CIVIDIS = torch.tensor(list(bytes.fromhex(
    "00224e002656002a5f002d68003070083370163770203a6f273e6e2e416d34456c3a486c3f4c6c"
    "444f6c49536c4e566c535a6d575d6d5c616e60646f656870696b716d6f727272747676767a7a78"
    "7e7d788381798885788d8878928c789690779b9476a09875a59c74aaa073afa471b5a86fbaac6d"
    "bfb06bc4b468c9b965cfbd62d4c15fdac65bdfca57e5cf52ead34cf0d846f6dd3ffce236fee838"
))).reshape(-1, 3) / 255


def cividis(share: Tensor) -> Tensor:
    """Red, green and blue [..., 3] in 0…1 of shares [...]; beyond 0…1 they get the colour of the nearest end."""
    place = share.float().clamp(0, 1) * (len(_CIVIDIS) - 1)
    below = place.long().clamp(max=len(_CIVIDIS) - 2)
    stops = _CIVIDIS.to(share.device)
    return torch.lerp(stops[below], stops[below + 1], (place - below)[..., None])
