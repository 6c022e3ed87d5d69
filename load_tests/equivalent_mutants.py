"""List mutants without an effect that a client, an operator or the worker could notice.

Each has its reason.
"""

from __future__ import annotations

_STEP_COSTS = "server/engine/latency_model.py:LatencyModel._seconds_per_round: "
_STEP_COSTS_LINE = (
    "None if any(each is None for each in seconds) else sum(each or 0.0 for each in seconds)"
)

_HALTON = "model/sampling.py:halton_ranks: "
_HALTON_FIRST = "first, known = np.full(n, -1, dtype=np.int64), 0"
_HALTON_INDEX = "index = np.arange(start, start + 4 * n)"

_V3_BUCKETS = "server/engine/graph_shapes.py:step_buckets: "
_V3_CONFIG = "isinstance(config, BundleV3Config)"
_V3_DENOISER = "isinstance(denoiser, DenoiserConfig)"

_NATIVE = "server/api/routes_native.py:: "
_NATIVE_FILE = '_FILE = {"b64_json": "…", "width": 256, "height": 256}'
_NATIVE_QUEUED = '("queued", {"id": "mine", "position": 0, "predicted_s": 0.08}),'
_NATIVE_PREVIEW = '("preview", {"index": 0, "step": 1, "of": 2, **_FILE, "format": "jpeg"}),'
_NATIVE_IMAGE = '("image", {"index": 0, **_FILE, "seed": 7, "format": "png"}),'

EQUIVALENT: dict[str, str] = {
    f"{_STEP_COSTS}any((each is None for each in seconds)) -> all((each is None for each in seconds)) in {_STEP_COSTS_LINE}": (
        "a cost is None if nothing was measured lately, and then all costs are"
    ),
    f"{_STEP_COSTS}0.0 -> 1.0 in {_STEP_COSTS_LINE}": "no measured cost is 0, and None costs return before",
    f"{_STEP_COSTS}count -> not (count) in if count": "every pool has a share above 0: jobs without steps left are dropped before",
    "server/engine/worker_process.py:: 5.0 -> 10.0 in EXIT_GRACE_S = 5.0": "a grace period, chosen by taste; the tests read the constant",
    "server/engine/worker_process.py:run_worker: limit_spin_count() -> pass": "changes speed alone, which no test measures",
    "server/api/validation.py:from_validation: False -> True in "
    "first = _of_lists(error.errors(include_url=False)[0])": (
        "the answer is made of other entries; leaving these out saves time"
    ),
    "server/api/images/encode.py:_save_png: 1 -> 2 in "
    'pillow_image.save(file, "PNG", compress_level=1, compress_type=zlib.Z_RLE, pnginfo=chunks)': (
        "the same pixels, a little smaller and a little later"
    ),
    "model/sampling.py:: 64 -> 65 in _BLOCK = 64  # codes whose probabilities are summed at once": (
        "any block size draws the same codes; it changes speed, which no test measures"
    ),
    "model/sampling.py:: 1.0 -> 2.0 in "
    "NEVER = -1.0  # a renoising probability below every uniform number": (
        "any number below 0 is below every uniform number"
    ),
    "model/sampling.py:: 16 -> 17 in _GRIDS = 16  # whose Halton orders are remembered": (
        "it changes speed and memory, which no test measures"
    ),
    f"{_HALTON}4 -> 5 in {_HALTON_INDEX}": (
        "any number of points at once gives the same order; it changes speed"
    ),
    f"{_HALTON}4 * n -> 4 / n in {_HALTON_INDEX}": (
        "any number of points at once gives the same order; it changes speed"
    ),
    f"{_HALTON}1 -> 2 in {_HALTON_FIRST}": "any number below 0 says that no point was there",
    f"{_HALTON}0 -> 1 in {_HALTON_FIRST}": (
        "counted anew before it is read again; it ends the search at once in a grid of one"
        " position, whose rank is 0 all the same"
    ),
    "model/rows.py:edit: row.step > 0 -> row.step >= 0 in if row.step > 0:": (
        "before step 0 all is noise: renoising with probability 1 leaves the start tokens there"
    ),
    f"{_V3_BUCKETS}{_V3_CONFIG} and {_V3_DENOISER} -> {_V3_CONFIG} or {_V3_DENOISER} in "
    f"if {_V3_CONFIG} and {_V3_DENOISER}:": (
        "both are true of v3 bundles and false of v1 ones; the second is for the type checker"
    ),
    "server/http_protocol.py:: 5.0 -> 10.0 in CLOSE_TIMEOUT_S = 5.0": (
        "a grace period, chosen by taste, like EXIT_GRACE_S"
    ),
    "server/api/routes_native.py:: 0 -> 1 in "
    '("preview", {"index": 0, "step": 1, "of": 2, **_FILE, "format": "jpeg"}),': (
        "an example in the document; a request for several images has this index too"
    ),
    'server/api/openapi.py:: 2 -> 3 in "/v1/images/variations": {"image": IMAGE, "n": 2},': (
        "an example in the document, in which any number of images works"
    ),
    "server/api/routes_openai.py:: 0 -> 1 in "
    '(f"{_prefix}.completed", {**_example, "index": 0, "usage": {"…": 0}}),': (
        "an example in the document; a request for several images has this index too"
    ),
    "server/api/sdapi/clients.py:Drawing: 0.0 -> 1.0 in predicted_s: float = 0.0": (
        "read only of an admitted job, whose prediction replaces it"
    ),
    "server/engine/hooks.py:ReplayFilter._is_new: 1 -> 2 in "
    "latest = self._latest_preview.get(image.index, -1)": ("previews are numbered from 0 on"),
    "server/engine/cpu_threads.py:ThreadTuner._record_step: self._most > 1 -> self._most >= 1 in "
    "if self._wait == 0 and self._trial is None and self._most > 1:": (
        "with one thread at most, the only other number to try is one"
    ),
    "server/engine/supervisor.py:Supervisor.__init__: self._started_at = 0.0 -> pass": (
        "every start sets it before anything reads it"
    ),
    "server/engine/supervisor.py:Supervisor.__init__: 0.0 -> 1.0 in self._started_at = 0.0": (
        "every start sets it before anything reads it"
    ),
    "server/api/sdapi/clients.py:Drawing._by_previews: 1.0 -> 2.0 in return 1.0": (
        "a running request's progress is bounded by MOST_PROGRESS"
    ),
    "server/api/json_body.py:_reason: 200 -> 201 in return reason(error)[:200]": (
        "no message of the JSON parser is that long"
    ),
    "server/api/images/admission.py:: 10 -> 11 in DECODE_PRIORITY = 10": (
        "a priority, chosen by taste; the tests replace it"
    ),
    "server/api/images/admission.py:_Entry: 0 -> 1 in bytes: int = 0": (
        "every entry of the queue has its own number before it is in it"
    ),
    "server/api/images/admission.py:_Entry: 0 -> 1 in pixels: int = 0": (
        "every entry of the queue has its own number before it is in it"
    ),
    "server/api/images/bmff.py:still_image: codecs <= set(CODECS) -> codecs < set(CODECS) in "
    "if len(codecs) != 1 or not codecs <= set(CODECS):": "one codec is never all of them",
    "server/api/images/colour.py:_by_code_points: 0 -> 1 in "
    "if (primaries == 1 and TRANSFERS.get(transfer, 0) is None) or transfer not in TRANSFERS:": (
        "any number stands for an unknown transfer function, which the second half refuses"
    ),
    "server/api/images/colour.py:_by_code_points: 2 -> 3 in "
    "def _by_code_points(primaries: int = 2, transfer: int = 2) -> bytes | None:": (
        "code points that are cut off are unknown, as 2 and 3 both are"
    ),
    "server/api/images/decoded_image.py:: 256 -> 257 in GREY_ROWS = 256": (
        "rows computed at once; the result is the same"
    ),
    "server/api/images/decode.py:: 64 -> 65 in FILLER = bytes(range(64))": (
        "any coded pixels show whether the decoder still waits for some"
    ),
    "server/api/images/decode.py:_bounded.bounded: 1 -> 2 in "
    'scale = jpeg_scale(stored, size) if file.format == "JPEG" else 1': (
        "files of the other formats with too many pixels are refused before"
    ),
    "server/api/images/decode.py:_heif: decoder.options.THUMBNAILS = False -> pass": (
        "the decoder lists thumbnails in an image's info, where nobody reads them"
    ),
    "server/api/images/decode.py:_heif: False -> True in decoder.options.THUMBNAILS = False": (
        "the decoder lists thumbnails in an image's info, where nobody reads them"
    ),
    "server/api/images/decode.py:_differs_from_key: 255 -> 256 in "
    "return _differs(stored, key * (255 // ((1 << depth) - 1)))": (
        "the depth is 2, 4 or 8 here, for which the quotient is the same"
    ),
    "server/api/images/encode.py:_with_equal_frames: 0 -> 1 in parts, repeats = [gif[:start]], 0": (
        "Pillow writes a block with its time before every frame, which sets the number"
    ),
    "server/api/images/fit.py:framed: max(frame) > side -> max(frame) >= side in "
    "return fitted(source, within(frame, side) if max(frame) > side else frame, mode)": (
        "a frame whose longer side is already as long is scaled to itself"
    ),
    "server/api/images/fit.py:framed: ratio[0] * source[1] > ratio[1] * source[0] -> "
    "ratio[0] * source[1] >= ratio[1] * source[0] in "
    "is_wider = ratio[0] * source[1] > ratio[1] * source[0]": (
        "an image in the ratio itself does not come here"
    ),
    "server/api/images/fit.py:fitted: size[0] * source[1] > size[1] * source[0] -> "
    "size[0] * source[1] >= size[1] * source[0] in "
    "is_wider = size[0] * source[1] > size[1] * source[0]": (
        "an image in the ratio itself does not come here"
    ),
    "server/api/images/signing.py:Signer.__init__: 1 -> 2 in "
    'PIL.Image.new("RGB", (1, 1)).save(file, "PNG")': (
        "the image is signed for a trial alone, which works with any size"
    ),
    "server/api/planning/draft.py:Draft.fitted_size: side < max(source) -> side <= max(source) in "
    "reduced = (within(source, side) for side in reversed(sides) if side < max(source))": (
        "the further size is the image's own, which was tried before"
    ),
    "server/api/planning/conditions.py:decode_regions: check_operation(drafted.config, 'regions') "
    '-> pass in check_operation(drafted.config, "regions")': (
        "all weights whose requests may have regions support them"
    ),
    "server/api/planning/operations.py:_edit: check_operation(drafted.config, 'inpaint') -> pass "
    'in check_operation(drafted.config, "inpaint")': "all weights that edit inpaint too",
    "server/api/sdapi/schemas.py:SdFields: True -> False in "
    'model_config = ConfigDict(extra="ignore", frozen=True)': "nothing assigns to a field",
    "server/api/sdapi/schemas.py:SdRequest.native: raise NotImplementedError -> pass": (
        "every request that is made has a method of its own"
    ),
    "server/api/validation.py:_meant: 1 -> 2 in "
    "near = difflib.get_close_matches(plain, by_plain, 1, ALIKE)": "only the nearest is named",
    "server/api/validation.py:_list: 0 -> 1 in "
    "if entries and all(entry == entries[0] for entry in entries):": (
        "the entries of every list of a fixed length are alike"
    ),
    "server/api/validation.py:_list: all((entry == entries[0] for entry in entries)) -> "
    "any((entry == entries[0] for entry in entries)) in "
    "if entries and all(entry == entries[0] for entry in entries):": (
        "the entries of every list of a fixed length are alike"
    ),
    **dict.fromkeys(
        (
            f"{_NATIVE}256 -> 257 in {_NATIVE_FILE}",
            f'{_NATIVE}1763749200 -> 1763749201 in "created": 1763749200,',
            f"{_NATIVE}0 -> 1 in {_NATIVE_QUEUED}",
            f"{_NATIVE}0.08 -> 0.16 in {_NATIVE_QUEUED}",
            f'{_NATIVE}2 -> 3 in ("started", {{"id": "mine", "steps": 2}}),',
            f"{_NATIVE}1 -> 2 in {_NATIVE_PREVIEW}",
            f"{_NATIVE}2 -> 3 in {_NATIVE_PREVIEW}",
            f"{_NATIVE}0 -> 1 in {_NATIVE_IMAGE}",
            f"{_NATIVE}7 -> 8 in {_NATIVE_IMAGE}",
        ),
        "an example in the document, in which another number would do",
    ),
    **dict.fromkeys(
        (
            "server/api/sdapi/generation.py:A1111Answer.respond: 90 -> 91 in contents, seconds = "
            'await encode_all(self.state, self.plan, finished, "png", 90, text)',
            "server/api/sdapi/extras.py:_enlarged.run: 90 -> 91 in (content,), seconds = "
            'await encode_all(state, planned, finished, "png", 90)',
            "server/api/sdapi/progress.py:_current_image.work: 90 -> 91 in "
            'content = encode(planned.finish(preview.image), "png", 90, {}, marking=marking)',
        ),
        "a PNG has no quality",
    ),
    'server/api/sdapi/generation.py:_white_mask.work: 1 -> 2 in file, "PNG", compress_level=1': (
        "the same pixels, a little smaller and a little later"
    ),
    "server/engine/client.py:EngineClient._forget: entry.set_timeout(None) -> pass": (
        "the timer would find the job answered"
    ),
    "server/engine/cpu_environment.py:worker_environment: 62 -> 63 in "
    'environment.setdefault("TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD", str(1 << 62))': (
        "no allocation is as large as either"
    ),
}
