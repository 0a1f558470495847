"""What a workflow may say of an account whose campaign budgets it decides.

Belongs here: the settings and the API's own limits on them. Does not: any call (``google_ads``).
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

OFFICIAL = "https://searchads360.googleapis.com/"
MOST_OPERATIONS = 5_000
MOST_FILTER_VALUES = 10_000


class GoogleAdsSettings(BaseModel):
    """The downstream system of a workflow with kind ``google_ads``: one account's campaign budgets, in micros."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["google_ads"] = "google_ads"
    customer_id: str = Field(description="The account, ten digits; dashes may stand in it")
    login_customer_id: str | None = Field(default=None, description="The manager account through which it is reached")
    endpoint: str = Field(default=OFFICIAL, description="Where the API is; plain http only on this machine")
    token_env: str = Field(
        default="SIGNALBOX_GOOGLE_ADS_TOKEN", description="Environment variable with an OAuth access token"
    )
    refresh_token_env: str | None = Field(
        default=None, description="Environment variable with an OAuth refresh token; set: `token_env` is not read"
    )
    client_id_env: str = Field(
        default="SIGNALBOX_GOOGLE_ADS_CLIENT_ID", description="Environment variable with the OAuth client's id"
    )
    client_secret_env: str = Field(
        default="SIGNALBOX_GOOGLE_ADS_CLIENT_SECRET", description="Environment variable with the OAuth client's secret"
    )
    token_uri: str = Field(default="https://oauth2.googleapis.com/token", description="Where tokens are refreshed")
    developer_token_env: str | None = Field(
        default=None, description="Environment variable with a developer token, where the endpoint asks for one"
    )
    entity: Literal["budget", "campaign"] = Field(
        default="budget",
        description="What an entity of the workflow names. Campaigns may share a budget; it is then written once",
    )
    match: Literal["name", "id"] = Field(default="name", description="Whether entities are names or ids of these")
    unit_micros: int = Field(
        default=10_000, gt=0, description="Smallest amount of the account's currency (a cent); others are refused"
    )
    user_email: str | None = Field(
        default=None,
        description="The token's account, as the change history shows it; used by no person. Null: no change history",
    )
    history_delay_s: float = Field(
        default=180.0, ge=0, description="How late a change may appear in the change history (Google: up to 3 minutes)"
    )
    stale_reads_s: float = Field(
        default=10.0, ge=0, description="For how long a search may still show what stood before a write"
    )
    timeout_s: float = Field(default=30.0, gt=0, le=600, description="Longest wait; a whole call takes twice that")
    bulk_read: int = Field(default=1_000, ge=1, le=MOST_FILTER_VALUES, description="Most entities in one search")
    bulk_write: int = Field(default=200, ge=1, le=MOST_OPERATIONS, description="Most budgets in one mutate")
    page_size: int | None = Field(
        default=None, ge=1, le=10_000, description="Rows of a page; null: what the API gives (10,000)"
    )

    @field_validator("customer_id", "login_customer_id")
    @classmethod
    def _digits(cls, value: str | None) -> str | None:
        if value is None:
            return None
        plain = value.replace("-", "")
        if not re.fullmatch(r"[0-9]{1,20}", plain):
            raise ValueError("an account is a number such as 123-456-7890")
        return plain

    @model_validator(mode="after")
    def _one_email(self) -> GoogleAdsSettings:
        if self.user_email is not None and not re.fullmatch(r"[^@\s]+@[^@\s]+", self.user_email):
            raise ValueError("user_email is no e-mail address")
        return self
