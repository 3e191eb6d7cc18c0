"""Print the size of the project, and fail where a budget is exceeded: lines a file, of the package, of the tests."""

import subprocess
import sys

# Lines; the package is on its way to 10 500, the tests to 10 000.
FILE, PACKAGE, TESTS = 450, 14_250, 11_550


def lines(*patterns: str) -> dict[str, int]:
    """Return the number of lines of each file under version control that matches."""
    names = subprocess.run(["git", "ls-files", "-z", *patterns], capture_output=True, text=True, check=True).stdout
    found = {}
    for name in filter(None, names.split("\0")):
        with open(name, encoding="utf-8") as file:
            found[name] = sum(1 for _ in file)
    return found


package, tests = lines("citer_hf/*.py"), lines("tests/*.py")
long_files = {name: count for name, count in package.items() if count > FILE}
print(f"citer_hf/: {sum(package.values())} lines (at most {PACKAGE}) in {len(package)} files")
print(f"tests/: {sum(tests.values())} lines (at most {TESTS}) in {len(tests)} files")
print(f"longest file: {max(package.values())} lines (at most {FILE})", *long_files)
sys.exit(bool(long_files) or sum(package.values()) > PACKAGE or sum(tests.values()) > TESTS)
