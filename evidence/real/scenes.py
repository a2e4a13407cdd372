"""The 21 classes of UC Merced's photographs: what they are called in answers, and the words that name them in captions."""

import re

# by the class as the data spell it: its name, and what in a caption names it, as a pattern of whole words. People often
# say what is to be seen at a place instead of what it is called.
_SCENES = {
    "agricultural": ("farmland", "farmlands?|croplands?"),
    "airplane": ("airport", "airplanes?|planes?"),
    "baseballdiamond": ("baseball diamond", "baseball"),
    "beach": ("beach", "beach|beaches|waves"),
    "buildings": ("buildings", "buildings?"),
    "chaparral": ("chaparral", "chaparral|plants (are )?scattered"),
    "denseresidential": ("dense residential area", "dense residential|^(?!.*(medium|sparse|mobile)).*houses"),
    "forest": ("forest", "forest"),
    "freeway": ("freeway", "freeways?"),
    "golfcourse": ("golf course", "golf"),
    "harbor": ("harbor", "harbor|boats"),
    "intersection": ("intersection", "intersections?|crossroads?|t-junction"),
    "mediumresidential": ("medium residential area", "medium residential"),
    "mobilehomepark": ("mobile home park", "mobile homes?"),
    "overpass": ("overpass", "overpass|overpasses|go across|goes across"),
    "parkinglot": ("parking lot", "parking lot"),
    "river": ("river", "river"),
    "runway": ("runway", "runways?"),
    "sparseresidential": ("sparse residential area", "sparse residential|villas?|house"),
    "storagetanks": ("storage tanks", "storage tanks?"),
    "tenniscourt": ("tennis court", "tennis"),
}
NAMES = {scene: name for scene, (name, _) in _SCENES.items()}
_PATTERNS = {scene: re.compile(rf"\b({pattern})\b") for scene, (_, pattern) in _SCENES.items()}


def is_named(scene: str, caption: str) -> bool:
    """Whether a caption names a class."""
    return _PATTERNS[scene].search(caption.lower()) is not None
