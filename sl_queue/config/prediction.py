"""The tables [predict] and [serve] of a party file."""

from typing import Literal, Self

from pydantic import Field, model_validator

from sl_queue.config.paths import PathInFolder
from sl_queue.config.schema import Schema


class PredictFile(Schema):
    """Rows to predict: a table like that of [data], with columns of the same names, and no labels."""

    path: PathInFolder = Field(description="the name of a file like that of data.path: this party's rows to predict")
    out: PathInFolder | None = Field(
        default=None,
        description="the name of a .parquet or .csv file: predictions, which only the label holder gets; without it, "
        "predictions.parquet in --out, or beside the party file",
    )
    missing: Literal["refuse", "leave-out"] = Field(
        default="refuse",
        description='"refuse" or "leave-out": what becomes of rows of the label holder that another party lacks',
    )


class ServeFile(Schema):
    """Answers of a trained model to single requests: an HTTP service at the label holder, activations elsewhere."""

    listen: str = Field(
        default="127.0.0.1:8080",
        pattern=r"^.+:\d{1,5}$",
        description="HOST:PORT: where the label holder's service listens",
    )
    deadline: float = Field(
        default=2.0, gt=0, le=600, description="a number above 0: seconds after which a request is given up"
    )
    certificate: PathInFolder | None = Field(
        default=None,
        description="the name of a PEM file: the certificate of the service, and of those between it and the "
        "authority; with it and `key` it speaks HTTPS alone",
    )
    key: PathInFolder | None = Field(
        default=None, description="the name of a PEM file: the private key of the certificate, readable by nobody else"
    )
    token: str | None = Field(
        default=None,
        description="file:PATH: the file with the token that a request must bear; without it, nobody is asked for one",
    )
    at_most: int = Field(
        default=0,
        ge=0,
        description="a whole number of at least 0: rows that a feature party answers in an hour; 0 is no limit",
    )

    explain: bool = Field(
        default=False,
        description="true or false: a feature party also answers with values of its columns dealt out to other "
        "rows; so the label holder measures what each is worth to the model, and tells this party",
    )

    @model_validator(mode="after")
    def _has_both(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            missing = "key" if self.key is None else "certificate"
            raise ValueError(f"{missing} is missing: HTTPS needs certificate and key")
        return self
