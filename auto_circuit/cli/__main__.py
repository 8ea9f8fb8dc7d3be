"""`python -m auto_circuit.cli`."""

from auto_circuit.cli import main

raise SystemExit(main())
