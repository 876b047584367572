"""A world with a sample and an option of its own."""

import copy
import pickle
from dataclasses import replace
    def __init__(self, mark, **options):
        super().__init__(**options)
        self.mark = mark

    def sample(self, rng):
        return replace(super().sample(rng), prompt=f'{self.split} {self.mark} "RUN"')


class NoSplit(World):
    def __init__(self, mark):
        super().__init__(placement="even")
        self.mark = mark

    def sample(self, rng):
        return replace(super().sample(rng), prompt=f'{self.split} {self.mark} "RUN"')


class TestHeldOut:
    @pytest.mark.parametrize("world", [Shout("!", placement="even", size=128), Shout(mark="!", split="val"), NoSplit("!")])
    def test_comes_from_the_world_that_was_given(self, world):
        for twin in (world, pickle.loads(pickle.dumps(world)), copy.deepcopy(world)):
            other = twin.of_split("test")
            assert (type(other), other.mark, other.placement, other.size) == (
                type(world),
                "!",
                world.placement,
                world.size,
            )
            scenes = twin.held_out(3, seed=1)
            assert scenes == twin.held_out(5, seed=1)[:3]
            assert {scene.prompt for scene in scenes} == {'test ! "RUN"'}
            assert all(split_of(word) == "test" for scene in scenes for word in scene.words)

    def test_placement_is_kept(self):
        lone = [scene.boxes[0][1] for scene in World(placement="even").held_out(20) if len(scene.boxes) == 1]
        assert set(lone) == {16}  # in the middle

    def test_unknown_split(self):
        with pytest.raises(ValueError, match="unknown split 'exam'"):
            World().held_out(1, split="exam")
