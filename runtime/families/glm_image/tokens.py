"""GLM-Image's token stage: requests' prior tokens, by a decoding loop of our own.

The stock model reads each prompt; every token after that is one step of `Decoder` where there is one, for all requests
at once, else one more forward of the stock model. Either way the noise that samples is drawn on the CPU from the
request's own generator, a row of the vocabulary for each token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from runtime.engine.context import Context
from runtime.families.glm_image.decoder import CHUNK, Decoder, Prompt, Sampling


def sampling(processors: Any, book: int) -> Sampling | None:
    """What a list of transformers' logits processors comes to; None where it is more than the sampler knows."""
    temperature, top_p = 1.0, 1.0
    for processor in processors:
        if type(processor) is TemperatureLogitsWarper:
            temperature *= processor.temperature
        elif type(processor) is TopPLogitsWarper and processor.min_tokens_to_keep == 1 and top_p == 1.0:
            top_p = processor.top_p
        elif not (
            type(processor) is SuppressTokensLogitsProcessor
            or (type(processor) is TopKLogitsWarper and processor.top_k >= book)
        ):
            return None
    return Sampling(temperature, top_p)


@dataclass(frozen=True)
class Wanted:
    """One request's prompt, as the processor gives it, and how many ids it wants from which noise."""

    inputs: Any
    count: int
    generator: torch.Generator


class TokenStage:
    """`ops` is `kernels` or `reference`; None leaves decoding to the stock model. At most `rows` requests at a time."""

    def __init__(self, encoder: Any, book: int, ops: Any, rows: int = 1) -> None:
        self._encoder, self._book = encoder, book
        # The head can say more ids than the DiT's embedding has rows; the end token would shorten the picture.
        self._outside_book = list(range(book, encoder.config.text_config.vision_vocab_size))
        self.decoder = Decoder(encoder, book, ops, rows) if ops else None
        self.together = self.decoder is not None  # whether several requests gain from one call

    def generate(self, requests: Sequence[Wanted], context: Context) -> list[torch.Tensor]:
        """Each request's `count` ids of the code book, of shape (count,), drawn as torch.multinomial does on the CPU:
        argmax of probability over exponential noise. Prompts are read one by one, without padding."""
        found: list[Any] = []
        for wanted in requests:
            context.check()
            self.forget()
            found.append(
                self._encoder.generate(
                    **wanted.inputs,
                    max_new_tokens=wanted.count + 1,  # stock samples one token more, for an end that nothing reads
                    do_sample=True,
                    suppress_tokens=self._outside_book or None,
                    custom_generate=self._method(wanted, context),
                )
            )
        if self.decoder is not None and isinstance(found[0], Prompt):
            return self.decoder.run(found, [wanted.generator for wanted in requests], context)
        return found

    def forget(self) -> None:
        """What the stock model keeps between forwards must not reach the next request."""
        model = self._encoder.model
        model.rope_deltas = model._cached_decode_position_ids = model._prefill_len = None

    def _method(self, wanted: Wanted, context: Context) -> Callable[..., Prompt | torch.Tensor]:
        """A decoding method for transformers' `generate`: what it gives is for the decoder, or else the ids."""

        def method(
            model: Any,
            input_ids: torch.Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: Any,
            **model_kwargs: Any,
        ) -> Prompt | torch.Tensor:
            outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
            known = sampling(logits_processor, self._book)
            if self.decoder is not None and known is not None:
                return self.decoder.prompt(outputs, wanted.count, known)
            self.together = False  # the checkpoint's sampling is more than the decoder knows
            return self._stock(input_ids, outputs, logits_processor, model_kwargs, wanted, context)

        return method

    def _stock(
        self,
        input_ids: torch.Tensor,
        outputs: Any,
        logits_processor: Any,
        model_kwargs: dict[str, Any],
        wanted: Wanted,
        context: Context,
    ) -> torch.Tensor:
        model, start, count = self._encoder, input_ids.shape[1], wanted.count
        for step in range(1, count + 1):
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)
            probabilities = logits_processor(input_ids, logits).softmax(dim=-1)
            noise = torch.empty(probabilities.shape).exponential_(1, generator=wanted.generator)
            drawn = (probabilities / noise.to(probabilities.device)).argmax(dim=-1, keepdim=True)
            input_ids = torch.cat([input_ids, drawn], dim=-1)
            if step % CHUNK == 0 or step == count:
                context.advance("tokens", step, count)
            if step < count:
                inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **model_kwargs)
                outputs = model(**inputs, return_dict=True)
        return input_ids[0, start:]
