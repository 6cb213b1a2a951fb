"""Valid and invalid requests generated from the OpenAPI schema: none may cause a server error."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings, strategies
from serving import Place, base64_of, picture, probe_head, serving, tiny_release

pytestmark = pytest.mark.slow

WORDS = """rows mask n temperature top_k top_p seed response_format stream layer pooling head model per_pixel tokens
image other"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("fuzzed")
    release = tiny_release(str(folder / "tiny"), n_px=4)
    with serving({"tiny": release}, {"pets": probe_head(str(folder / "pets"), release, ["cat", "dog"])}) as place:
        yield place


def test_generated_requests_cause_no_server_error(place: Place) -> None:
    schema = schemathesis.openapi.from_url(f"{place.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 7
    for operation in operations:
        wrong_too = operation.method.lower() == "post"  # nothing can be wrong about a GET without parameters
        for mode in schemathesis.GenerationMode if wrong_too else [schemathesis.GenerationMode.POSITIVE]:

            @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
            @given(operation.as_strategy(generation_mode=mode))
            def fuzz(case: Any) -> None:
                answer = case.call()
                assert answer.status_code < 500, (case.body, answer.text)
                assert answer.status_code < 400 or answer.json()["error"]["code"]

            fuzz()


@pytest.mark.parametrize("path", ["completions", "features", "classify", "score"])
def test_generated_fields_with_a_valid_image_cause_no_server_error(place: Place, path: str) -> None:
    """Generated bodies rarely contain an image and are rejected early; these requests reach later code."""
    words = strategies.sampled_from(WORDS.split())
    values = strategies.recursive(
        strategies.none()
        | strategies.booleans()
        | strategies.integers()
        | strategies.floats()
        | strategies.text(max_size=8)
        | strategies.sampled_from(
            [0, 1, 3, "max", "tokens", "tiny", "pets", [[1, 0, 1, 0]] * 4, 2**63, 2**64 - 1, 1e-9]
        ),
        lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(words, inner, max_size=2),
        max_leaves=6,
    )

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(strategies.dictionaries(words, values, max_size=3))
    def fuzz(body: dict[str, Any]) -> None:
        answer = place.ask(f"/v1/{path}", {"image": base64_of(picture()), **body})
        assert answer.status in (200, 400, 404, 422), (body, answer)

    fuzz()
