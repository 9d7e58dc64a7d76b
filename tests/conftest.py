"""pytest explains the assertions of tests.support too; what takes longest begins first."""

import pytest

pytest.register_assert_rewrite("tests.support")

# By their CPU time. Two processes take whole modules in this order: a long one at the end would leave one of them idle.
SLOWEST = (
    "test_guide",
    "test_training_network",
    "test_trainer_predict",
    "test_msrun",
    "test_docs",
    "test_run_infer",
    "test_readme",
    "test_loaders",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: number for number, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOWEST)))
