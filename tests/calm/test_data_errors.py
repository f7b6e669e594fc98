"""Messages survive the processes of datasets."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
from datasets.exceptions import DatasetGenerationError

from calm.errors import message_of, one_line


def full_disk():
    try:
        raise OSError(28, "No space left on device")
    except OSError as error:
        raise DatasetGenerationError("An error occurred") from error


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_an_error_that_datasets_wraps_here_and_in_another_process():
    with pytest.raises(DatasetGenerationError) as caught:
        full_disk()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        remote = pool.submit(full_disk).exception()
    assert type(remote.__cause__).__name__ == "_RemoteTraceback"
    for error in (caught.value, remote):
        assert message_of(error) == "[Errno 28] No space left on device"
        assert one_line(error).startswith("the disk is full: free some space")
