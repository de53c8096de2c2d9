# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A vision-language model at an HTTP endpoint as a judge of images."""

from typing import Any, Literal

from PIL import Image

from .judge_endpoint import Answer, JudgeEndpoint, Question
from .judge_logprobs import probability_of_yes
from .judge_score import parse_score, remove_thoughts
from .judge_templates import UNIFIED_REWARD_TEMPLATE, YES_NO_TEMPLATE


LABEL = "Final Score"
RANGE = (1.0, 5.0)
TOP_LOGPROBS = 20  # the most that OpenAI's interface gives


class VLMJudge:
    """
    A vision-language model that judges how well an image shows its prompt and how good it looks.

    The model is at an OpenAI-compatible endpoint: vLLM, SGLang or a service. Template, label and range are those of
    UnifiedReward (https://huggingface.co/papers/2503.05236) with pointwise scores; with others, every model that
    follows instructions can be a judge. The wording of the template is our own. To compare with numbers published for
    a model, pass the template of its authors.

    The value is `(score - low) / (high - low)`, so 1 to 5 becomes 0 to 1. Papers report the score itself, `1 + 4 *
    value`, or a fifth of it; this does not change the advantages, which are normalized.

    An answer whose score is uncertain is a failure of its image, never a number: one that was cut off, or has several
    scores, a score on another scale, a sum, or a score only in the thoughts of the model. Thoughts are what stands
    between tags (`<think>`) or comes apart from the answer (`reasoning_content`). A model that thinks needs more
    tokens than the default: raise `max_tokens` in `request_options`.

    Transparent images are put on white. Calls may overlap and may come from different event loops.

    Args:
        model (`str`):
            Name of the model on the endpoint, such as `"CodeGoat24/UnifiedReward-qwen-7b"`.
        base_url (`str`):
            The endpoint, up to and with `/v1`: `"http://127.0.0.1:8000/v1"`.
        api_key (`str`, *optional*):
            Key of the endpoint. Defaults to the environment variable `OPENAI_API_KEY`; an empty string sends none.
        prompt_template (`str`, *optional*):
            The question about each image. `{prompt}` is replaced by its prompt; other braces stay. Defaults to
            `UNIFIED_REWARD_TEMPLATE`, with `score="p_yes"` to `YES_NO_TEMPLATE`. `ARTIFACT_TEMPLATE` asks for faults
            of generated images only.
        score_label (`str`, *optional*, defaults to `"Final Score"`):
            The words before the score in the model's answer, in any case. UnifiedReward 2.0 writes three scores, each
            of which can be a reward: `"Alignment Score"`, `"Coherence Score"` and `"Style Score"`.
        score_range (`tuple[float, float]`, *optional*, defaults to `(1.0, 5.0)`):
            Lowest and highest score. A score outside is a failure; it is not clipped.
        request_options (`dict`, *optional*):
            Further fields of the request, such as `{"chat_template_kwargs": {"enable_thinking": False}}`. They are
            added to `{"temperature": 0, "max_tokens": 512}`; `None` as a value removes a field.
        max_concurrency (`int`, *optional*, defaults to `16`):
            Largest number of simultaneous requests, over all calls of the process.
        timeout (`float`, *optional*, defaults to `300.0`):
            Longest time in seconds for the answer for one image, retries included.
        max_retries (`int`, *optional*):
            How often a request is sent again, within `timeout`, after its connection failed or was refused, or after a
            status that means "later": 408, 425, 429 and 5xx except 501 and 505. The delay doubles each time up to 8
            seconds, with jitter, and is at least what the endpoint asks for. Defaults to no limit but `timeout`.
        score (`"number"` or `"p_yes"`, *optional*, defaults to `"number"`):
            What the value is: the score that the model writes, or the probability that its answer begins with yes
            and not with no, `P(yes) / (P(yes) + P(no))`, from the log-probabilities of the first word after its
            thoughts. The probability tells images apart that a written score puts level. The endpoint must send
            `top_logprobs`; if it sends fewer than 20, set the number in `request_options`.

    Attributes:
        applies_to (`str`): In words, the images that the reward applies to.
        value_range (`str`): In words, the scale of the reward.

    Raises:
        `ValueError`: If an argument has an impossible value. No message contains the key.
    """

    applies_to = "every image"
    value_range = "0 to 1, the score's range made linear: 1 to 5 by default"

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key: str | None = None,
        prompt_template: str | None = None,
        score_label: str = LABEL,
        score_range: tuple[float, float] = RANGE,
        request_options: dict[str, Any] | None = None,
        max_concurrency: int = 16,
        timeout: float = 300.0,
        max_retries: int | None = None,
        score: Literal["number", "p_yes"] = "number",
    ) -> None:
        if score not in ("number", "p_yes"):
            raise ValueError(f"`score` is {score!r}; it must be 'number' or 'p_yes'.")
        if prompt_template is None:
            prompt_template = UNIFIED_REWARD_TEMPLATE if score == "number" else YES_NO_TEMPLATE
        if "{prompt}" not in prompt_template:
            raise ValueError(f"`prompt_template` has no {{prompt}}, which stands for the prompt: {prompt_template!r}.")
        if not score_label.strip():
            raise ValueError("`score_label` is empty; give the words in front of the score, such as 'Final Score'.")
        if not score_range[0] < score_range[1]:
            raise ValueError(f"`score_range` is {score_range}; the lowest score comes first.")
        if score == "p_yes":
            if (score_label, score_range) != (LABEL, RANGE):
                raise ValueError(
                    "`score_label` and `score_range` have no effect with `score='p_yes'`; leave them out."
                )
            request_options = {"logprobs": True, "top_logprobs": TOP_LOGPROBS} | (request_options or {})
            self.value_range = "0 to 1, the probability of yes"
        self.score = score
        self.prompt_template = prompt_template
        self.score_label = score_label
        self.score_range = score_range
        self._endpoint = JudgeEndpoint(
            model, base_url, api_key, request_options, max_concurrency, timeout, max_retries
        )

    async def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        trainer_state: Any = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: list,
    ) -> list[float | Exception | None]:
        """
        Judge images.

        Args:
            images (`list[PIL.Image.Image]`):
                Images of any mode and size.
            prompts (`list[str]`):
                Their prompts.
            trainer_state, log_metric, log_extra (*optional*):
                Not used.
            columns (`list`):
                Not used.

        Returns:
            `list[float | Exception | None]`: For each image a value in [0, 1], or a [`RewardError`] if the judge did
            not answer or its answer has no certain score.

        Raises:
            [`RewardError`]: If the endpoint refuses the key or the model, refuses every image (status 403 and the
                like), or is dead: no answer for 8 consecutive images (`max_concurrency` if that is more), or for every
                image of a smaller batch.
        """
        questions = [
            Question([image], self.prompt_template.replace("{prompt}", prompt))
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return await self._endpoint.ask(questions, self._number if self.score == "number" else self._p_yes)

    def _number(self, answer: Answer, _question: Question) -> float:
        """The value of an answer with a score."""
        answer.check_complete()
        scores = {parse_score(text, self.score_label, self.score_range) for text in answer.texts}
        if len(scores) > 1:
            raise ValueError("The parts of the answer have different scores.")
        low, high = self.score_range
        return (scores.pop() - low) / (high - low)

    def _p_yes(self, answer: Answer, _question: Question) -> float:
        """The value of an answer that begins with yes or no; what comes after that may be cut off."""
        if answer.ended_by != "length" or not remove_thoughts(answer.texts[0]).strip():
            answer.check_complete()
        return probability_of_yes(answer.texts[0], answer.tokens)
