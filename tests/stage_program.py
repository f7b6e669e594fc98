"""A stage of a campaign for its tests: runs the code in its first argument."""

import sys

code = sys.argv.pop(1)
exec(compile(code, "stage", "exec"))
