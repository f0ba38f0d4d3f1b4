"""What recipes share that leave the model as it is and train something beside it."""

from dataclasses import dataclass

from library.options.scripts import TrainingOptions
from library.training.setting import PartDTypes, Setting


@dataclass(frozen=True)
class FrozenModelRecipe:
    """The part of a `library.training.building.Recipe` that follows from a frozen model."""

    options: TrainingOptions

    def dtypes_of_parts(self, setting: Setting) -> PartDTypes:
        """Load everything in the type of the computation or in fewer bits, as nothing of the model itself is trained."""
        return PartDTypes.frozen(self.options.precision, setting.dtypes.compute)
