"""Options about the Hugging Face hub."""

from typing import ClassVar

from library.options.declare import OptionGroup, SecretText, flag, option


class HubOptions(OptionGroup):
    """Where saved files are uploaded, and states are fetched."""

    topic: ClassVar[str] = "Hugging Face upload"

    huggingface_repo_id: str | None = option(
        None, "Repository, user/name, that every saved model is uploaded to; made when it does not exist."
    )
    huggingface_repo_type: str | None = option(None, "model, dataset or space; a model repository when left out.")
    huggingface_path_in_repo: str | None = option(None, "Folder inside the repository; its top when left out.")
    huggingface_token: SecretText = option(None, "Access token; that of `hf auth login` or of HF_TOKEN when left out.")
    huggingface_repo_visibility: str | None = option(
        None, "public or private, for a repository that is made; private when left out."
    )
    save_state_to_huggingface: bool = flag("Upload state folders too.")
    resume_from_huggingface: bool = flag("Read --resume as user/repo/path[:revision[:type]] and download it.")
    async_upload: bool = flag("Upload while training goes on; the run ends when everything is uploaded.")
