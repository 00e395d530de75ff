"""Made-up tables of a bank and an insurer, as offices write them: who will default depends on both tables together.

    python make_data.py [CUSTOMERS]

Of all customers the bank has the first 85 %, the insurer the last 75 %, each in an order of its own.
"""

import sys
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

FOLDER = Path(__file__).parent
REGIONS = ["north", "south", "east", "west"]


def main(customers: int) -> None:
    random = np.random.default_rng(7)
    ids = random.choice(900_000, customers, replace=False) + 100_000
    age, income, balance, claims, mileage = random.standard_normal((5, customers))
    region = random.choice(4, customers, p=[0.4, 0.3, 0.2, 0.1])
    risk = 1.5 * claims * (income < 0) - balance + 0.8 * mileage - 0.5 * age + 0.8 * (region == 3) - 0.5
    defaulted = (risk + 0.5 * random.standard_normal(customers) > 0).astype(np.int64)
    gaps = random.random((4, customers)) < 0.08

    of_bank = random.permutation(int(0.85 * customers))
    with open(FOLDER / "bank.csv", "w", encoding="utf-8") as file:
        file.write("customer;age;income;region;since\n")
        for row in of_bank:
            years = "" if gaps[0, row] else f"{45 + 12 * age[row]:.0f}"
            earned = "" if gaps[1, row] else f"{3000 * np.exp(0.6 * income[row]):.2f}".replace(".", ",")
            lives = "" if gaps[2, row] else REGIONS[region[row]]
            since = date(2020, 1, 1) + timedelta(days=int(700 * balance[row]))
            file.write(f"C-{ids[row]};{years};{earned};{lives};{since:%d.%m.%Y}\n")

    of_insurer = random.permutation(np.arange(customers // 4, customers))
    columns = {
        "customer": [f"c-{ids[row]}" for row in of_insurer],
        "claims": [None if gaps[3, row] else float(claims[row]) for row in of_insurer],
        "mileage": mileage[of_insurer],
        "defaulted": defaulted[of_insurer],
    }
    pa.parquet.write_table(pa.table(columns), FOLDER / "insurer.parquet")
    print(f"bank.csv: {len(of_bank)} customers, insurer.parquet: {len(of_insurer)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4000)
