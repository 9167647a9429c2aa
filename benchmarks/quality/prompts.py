"""What is drawn. Nothing here is used for calibration anywhere."""

from dataclasses import dataclass

from flux_quant.benchmarks.tiny_flux.emoji import EmojiWorld, Scene

PLACES = (("large", "in the centre", "white"), ("small", "on the left", "green"))  # size, position, colour: in turns
NAMES = (  # of emoji, by `by_rule`
    "cyclone",
    "tomato",
    "birthday cake",
    "violin",
    "amphora",
    "ear",
    "skull",
    "calendar",
    "bell",
    "mount fuji",
    "articulated lorry",
    "passenger ship",
    "martial arts uniform",
    "butterfly",
    "bubble tea",
    "parachute",
)


@dataclass(frozen=True)
class Wanted:
    """What a caption of the bundled model asks for."""

    name: str
    size: str
    position: str
    colour: str

    @property
    def caption(self) -> str:
        """As `EmojiWorld.caption` has it, everything named."""
        place = f" {self.position}" if self.size == "small" else ""
        return f"{self.size} {self.name}{place} on a {self.colour} background"


SHIPPED = tuple(Wanted(name, *PLACES[i % 2]) for i, name in enumerate(NAMES))


def by_rule(world: EmojiWorld) -> tuple[str, ...]:
    """Emoji at equal distances in the world's order, the next one where the combination was never trained."""
    names = []
    for i in range(len(NAMES)):
        emoji = i * len(world) // len(NAMES)
        while world.held_out(Scene(emoji, *PLACES[i % 2], False, 0)):
            emoji += 1
        names.append(world.names[emoji])
    return tuple(names)


REAL = (  # for models that know the world; subjects in turns, so that the first few hold one of each
    "portrait of an old fisherman with a white beard, looking into the camera, soft window light",  # people
    'a wooden shop sign that reads "FRESH BREAD DAILY" above a bakery door',  # text
    "a mountain lake at dawn, fog between the pines, snow on the far peaks",  # landscape
    "close view of the gears inside an opened pocket watch, brass and steel, shallow focus",  # detail
    "a lighthouse in a storm, woodcut print in two colours",  # style
    "two girls laughing while they share an umbrella in a crowded street at night",
    'a chalkboard with the words "TODAY: SOUP 4.50" and a drawing of a bowl',
    "terraced rice fields seen from above in the late afternoon, long shadows",
    "dew drops on a spider web between grass blades, backlit",
    "a red fox asleep under a tree, watercolour on rough paper",
)
