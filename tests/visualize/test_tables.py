from visualize.test_report import curve, scores

from auto_circuit.visualize.tables import curve_table, node_table


def test_tables() -> None:
    lines = node_table(scores(), 2).splitlines()
    assert lines[2].split()[-4:] == ["latent", "3", "-2.0000", "1"]
    assert lines[3].split()[-3:] == ["error", "+1.0000", "2"] and len(lines) == 4
    assert curve_table(curve()).splitlines()[2].split() == ["1", "-0.200", "0.100"]
