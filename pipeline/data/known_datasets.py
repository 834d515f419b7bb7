"""The table of known datasets: Hub id, columns, classes, sizes and statistics of each."""

from dataclasses import dataclass

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DatasetRow:
    """One known dataset. mean and std are per channel, in units of 0..1; image_size is None for photos.

    label_columns maps each label column to its class names, in the order of the label ids; the first is the default.
    splits maps train, test and, if there is one, val to the split names of the dataset.
    flip: whether a mirrored image keeps its label. hub_id is None for the dataset in this package.
    """

    hub_id: str | None
    config: str | None
    image_column: str
    label_columns: dict[str, tuple[str, ...]]
    splits: dict[str, str]
    image_size: int | None
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool

    @property
    def label_column(self) -> str:
        return next(iter(self.label_columns))

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names of the default label column."""
        return self.label_columns[self.label_column]


TRAIN_TEST = {"train": "train", "test": "test"}
NUMERALS = tuple("0123456789")
FASHION = ("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_FINE = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm""".split()
)
CIFAR100_COARSE = tuple(
    """aquatic_mammals fish flowers food_containers fruit_and_vegetables household_electrical_devices
    household_furniture insects large_carnivores large_man-made_outdoor_things large_natural_outdoor_scenes
    large_omnivores_and_herbivores medium_mammals non-insect_invertebrates people reptiles small_mammals trees
    vehicles_1 vehicles_2""".split()
)
PETS = tuple("""abyssinian american_bulldog american_pit_bull_terrier basset_hound beagle bengal birman bombay boxer
    british_shorthair chihuahua egyptian_mau english_cocker_spaniel english_setter german_shorthaired great_pyrenees
    havanese japanese_chin keeshond leonberger maine_coon miniature_pinscher newfoundland persian pomeranian pug ragdoll
    russian_blue saint_bernard samoyed scottish_terrier shiba_inu siamese sphynx staffordshire_bull_terrier
    wheaten_terrier yorkshire_terrier""".split())

DATASETS: dict[str, DatasetRow] = {
    "digits": DatasetRow(
        hub_id=None,
        config=None,
        image_column="image",
        label_columns={"label": NUMERALS},
        splits=TRAIN_TEST,
        image_size=8,
        channels=1,
        mean=(0.3053,),
        std=(0.3758,),
        flip=False,
    ),
    "mnist": DatasetRow(
        hub_id="ylecun/mnist",
        config=None,
        image_column="image",
        label_columns={"label": NUMERALS},
        splits=TRAIN_TEST,
        image_size=28,
        channels=1,
        mean=(0.1307,),
        std=(0.3081,),
        flip=False,
    ),
    "fashion_mnist": DatasetRow(
        hub_id="zalando-datasets/fashion_mnist",
        config=None,
        image_column="image",
        label_columns={"label": FASHION},
        splits=TRAIN_TEST,
        image_size=28,
        channels=1,
        mean=(0.2860,),
        std=(0.3530,),
        flip=True,
    ),
    "cifar10": DatasetRow(
        hub_id="uoft-cs/cifar10",
        config=None,
        image_column="img",
        label_columns={"label": CIFAR10},
        splits=TRAIN_TEST,
        image_size=32,
        channels=3,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        flip=True,
    ),
    "cifar100": DatasetRow(
        hub_id="uoft-cs/cifar100",
        config=None,
        image_column="img",
        label_columns={"fine_label": CIFAR100_FINE, "coarse_label": CIFAR100_COARSE},
        splits=TRAIN_TEST,
        image_size=32,
        channels=3,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        flip=True,
    ),
    "oxford_iiit_pet": DatasetRow(
        hub_id="timm/oxford-iiit-pet",
        config=None,
        image_column="image",
        label_columns={"label": PETS, "label_cat_dog": ("cat", "dog")},
        splits=TRAIN_TEST,
        image_size=None,
        channels=3,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        flip=True,
    ),
}
