"""The card at the root, where readers look for it, is the one that the package fills in for each saved model."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_both_cards_are_the_same_file_twice():
    card = ROOT / "model_card.md"
    assert not card.is_symlink()
    assert card.read_bytes() == (ROOT / "configuration" / "model_card.md").read_bytes()
