"""Checks a bill of materials with CycloneDX's own library and schema.

    python3 cyclonedx_validate.py FILE
"""

import sys

import cyclonedx
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

if sys.argv[1:] == ["--version"]:
    sys.exit(print("cyclonedx-python-lib", cyclonedx.__version__))
with open(sys.argv[1], encoding="utf-8") as file:
    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(file.read())
sys.exit(f"{sys.argv[1]}: {error}" if error else 0)
