"""Made-up tables of a bank and an insurer with the same customers: who will default depends on both tables together.

    python make_data.py [ROWS]

The columns are standardised, as a party does with its own columns before it trains on them.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

FOLDER = Path(__file__).parent


def main(rows: int) -> None:
    random = np.random.default_rng(7)
    ids = np.arange(10_000, 10_000 + rows)
    age, income, balance = random.standard_normal((3, rows)).astype(np.float32)
    claims, mileage = random.standard_normal((2, rows)).astype(np.float32)
    risk = 1.5 * claims * (income < 0) - balance + 0.8 * mileage - 0.5 * age - 0.5
    defaulted = (risk + 0.5 * random.standard_normal(rows) > 0).astype(np.int64)

    bank = pa.table({"customer_id": ids, "age": age, "income": income, "balance": balance})
    insurer = pa.table({"customer_id": ids, "claims": claims, "mileage": mileage, "defaulted": defaulted})
    pa.parquet.write_table(bank.take(random.permutation(rows)), FOLDER / "bank.parquet")
    pa.csv.write_csv(insurer.take(random.permutation(rows)), FOLDER / "insurer.csv")
    print(f"{rows} customers: bank.parquet, insurer.csv")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4000)
