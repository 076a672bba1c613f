//! One job's row, and its bytes.
//!
//! All but the columns that are searched live in one encoded body, so that every back-end
//! stores the same bytes and one checksum covers a row.

use sha2::{Digest, Sha256};

use super::{Stored, Token};
use crate::clock::Millis;
use crate::job::{Fingerprint, Key, Lane, Status, reply};

/// Where a job stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// An intent is durable; the call may be under way.
    Sending,
    /// A retry is due at `not_before`.
    Waiting,
    /// An outcome is stored.
    Ended(Status),
}

impl State {
    /// The word in the ledger's column.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Sending => "sending",
            Self::Waiting => "waiting",
            Self::Ended(status) => status.as_str(),
        }
    }

    /// Reads the word.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "sending" => Some(Self::Sending),
            "waiting" => Some(Self::Waiting),
            word => Status::parse(word).map(Self::Ended),
        }
    }
}

/// What the ledger knows of one job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Where it stands.
    pub state: State,
    /// Raised by every claim and close; every result compares it.
    pub fence: u64,
    /// The last claim's name.
    pub token: Token,
    /// The worker process (embedded ledger: its start's number) that made the last claim.
    pub epoch: u64,
    /// Until when the last claim is alive, unless its epoch is over.
    pub lease_until: Millis,
    /// While waiting: when the retry is due.
    pub not_before: Millis,
    /// The body.
    pub fingerprint: Fingerprint,
    /// Where the job came from.
    pub lane: Lane,
    /// Its campaign.
    pub campaign: Option<String>,
    /// For the reply.
    pub product_id: String,
    /// Calls counted for this outcome.
    pub attempts: u32,
    /// How many of them cost no attempt.
    pub free: u32,
    /// Calls, ever, after which a session may exist that nobody was given.
    pub ambiguous: u32,
    /// How often a process ended while it was sending this job.
    pub crashes: u32,
    /// First pickup for this outcome.
    pub opened_at: Millis,
    /// First pickup ever.
    pub created_at: Millis,
    /// Last write.
    pub updated_at: Millis,
    /// When the outcome was made.
    pub ended_at: Option<Millis>,
    /// Creem's id of the session handed out.
    pub checkout_id: Option<String>,
    /// The reply's bytes.
    pub reply: Option<Vec<u8>>,
    /// The reply's `error.code`.
    pub code: Option<String>,
    /// Whether a copy of the job was parked for the outcome.
    pub parked: bool,
}

impl Row {
    /// The outcome, if there is one.
    #[must_use]
    pub fn stored(&self, key: &Key) -> Option<Stored> {
        let State::Ended(status) = self.state else { return None };
        let reply = self.reply.clone()?;
        Some(Stored {
            status,
            message_id: reply::message_id(key.mode, &reply),
            reply,
            ended_at: self.ended_at?,
            fence: self.fence,
            attempts: self.attempts,
            parked: self.parked,
            code: self.code.clone(),
        })
    }

    /// The columns that hold the row, around its encoded body.
    #[must_use]
    pub fn columns<'a>(&self, body: &'a [u8]) -> Columns<'a> {
        Columns {
            state: self.state.as_str(),
            updated_at: self.updated_at,
            ended_at: self.ended_at,
            ambiguous: self.ambiguous,
            body,
        }
    }

    /// The bytes of everything but the key and the searched columns.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::with_capacity(256 + self.reply.as_ref().map_or(0, Vec::len)));
        out.0.push(LAYOUT);
        out.number(self.fence);
        out.0.extend_from_slice(&self.token);
        out.number(self.epoch);
        for time in [self.lease_until, self.not_before, self.opened_at, self.created_at] {
            out.0.extend_from_slice(&time.to_le_bytes());
        }
        for count in [self.attempts, self.free, self.crashes] {
            out.0.extend_from_slice(&count.to_le_bytes());
        }
        out.0.push(u8::from(self.parked));
        out.bytes(self.lane.as_str().as_bytes());
        out.bytes(self.product_id.as_bytes());
        out.bytes(self.fingerprint.as_bytes());
        for text in [&self.campaign, &self.checkout_id, &self.code] {
            out.optional(text.as_deref().map(str::as_bytes));
        }
        out.optional(self.reply.as_deref());
        out.0
    }

    /// Reads a row back from its columns.
    ///
    /// # Errors
    /// What is wrong with it, without its content.
    pub fn decode(columns: &Columns<'_>) -> Result<Self, &'static str> {
        let state = State::parse(columns.state).ok_or("an unknown state")?;
        let mut body = Reader(columns.body);
        if body.take(1)? != [LAYOUT] {
            return Err("an unknown layout (written by a newer version?)");
        }
        let fence = body.number()?;
        let token = body.take(16)?.try_into().map_err(|_| "a short token")?;
        let epoch = body.number()?;
        let mut time = || Ok::<_, &'static str>(Millis::from_le_bytes(body.array()?));
        let (lease_until, not_before, opened_at, created_at) = (time()?, time()?, time()?, time()?);
        let mut count = || Ok::<_, &'static str>(u32::from_le_bytes(body.array()?));
        let (attempts, free, crashes) = (count()?, count()?, count()?);
        let parked = body.take(1)? == [1];
        let lane = Lane::parse(body.text()?).ok_or("an unknown lane")?;
        let row = Self {
            state,
            fence,
            token,
            epoch,
            lease_until,
            not_before,
            product_id: body.text()?.to_owned(),
            fingerprint: Fingerprint::from_bytes(body.bytes()?.to_vec()),
            lane,
            campaign: body.optional_text()?,
            checkout_id: body.optional_text()?,
            code: body.optional_text()?,
            reply: body.optional()?.map(<[u8]>::to_vec),
            attempts,
            free,
            ambiguous: columns.ambiguous,
            crashes,
            opened_at,
            created_at,
            updated_at: columns.updated_at,
            ended_at: columns.ended_at,
            parked,
        };
        if matches!(row.state, State::Ended(_)) && (row.reply.is_none() || row.ended_at.is_none()) {
            return Err("an ended row without a reply");
        }
        if body.0.is_empty() { Ok(row) } else { Err("trailing bytes") }
    }
}

/// Version of the body's layout.
const LAYOUT: u8 = 1;

/// A row as a back-end stores it.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// [`State`]'s word.
    pub state: &'a str,
    /// Last write.
    pub updated_at: Millis,
    /// When the outcome was made.
    pub ended_at: Option<Millis>,
    /// Ambiguous attempts.
    pub ambiguous: u32,
    /// [`Row::encode`].
    pub body: &'a [u8],
}

impl Columns<'_> {
    /// The checksum over key and columns; not a secret, it is against damage, not against people.
    #[must_use]
    pub fn checksum(&self, mode: &str, request_id: &str) -> [u8; 8] {
        let mut hash = Sha256::new();
        for part in [mode, request_id, self.state] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hash.update(self.updated_at.to_le_bytes());
        hash.update(self.ended_at.unwrap_or(-1).to_le_bytes());
        hash.update(self.ambiguous.to_le_bytes());
        hash.update(self.body);
        let digest: [u8; 32] = hash.finalize().into();
        let mut sum = [0; 8];
        sum.copy_from_slice(&digest[..8]);
        sum
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn number(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        // A body is at most a few dozen KiB; nothing near 4 GiB can get here.
        let length = u32::try_from(bytes.len()).expect("a field of a row is shorter than 4 GiB");
        self.0.extend_from_slice(&length.to_le_bytes());
        self.0.extend_from_slice(bytes);
    }

    fn optional(&mut self, bytes: Option<&[u8]>) {
        self.0.push(u8::from(bytes.is_some()));
        if let Some(bytes) = bytes {
            self.bytes(bytes);
        }
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], &'static str> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or("a truncated body")?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        self.take(N)?.try_into().map_err(|_| "a truncated body")
    }

    fn number(&mut self) -> Result<u64, &'static str> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn bytes(&mut self) -> Result<&'a [u8], &'static str> {
        let length = u32::from_le_bytes(self.array()?);
        self.take(usize::try_from(length).map_err(|_| "a truncated body")?)
    }

    fn text(&mut self) -> Result<&'a str, &'static str> {
        std::str::from_utf8(self.bytes()?).map_err(|_| "a text that is not UTF-8")
    }

    fn optional(&mut self) -> Result<Option<&'a [u8]>, &'static str> {
        if self.take(1)? == [1] { self.bytes().map(Some) } else { Ok(None) }
    }

    fn optional_text(&mut self) -> Result<Option<String>, &'static str> {
        self.optional()?
            .map(|bytes| {
                std::str::from_utf8(bytes)
                    .map(str::to_owned)
                    .map_err(|_| "a text that is not UTF-8")
            })
            .transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(crate) fn row() -> Row {
        Row {
            state: State::Ended(Status::Succeeded),
            fence: 3,
            token: [9; 16],
            epoch: 2,
            lease_until: 10,
            not_before: 0,
            fingerprint: Fingerprint::from_bytes(vec![1, 2, 3]),
            lane: Lane::Bulk,
            campaign: Some("autumn".into()),
            product_id: "prod_1".into(),
            attempts: 2,
            free: 1,
            ambiguous: 1,
            crashes: 0,
            opened_at: 5,
            created_at: 4,
            updated_at: 7,
            ended_at: Some(7),
            checkout_id: Some("ch_1".into()),
            reply: Some(b"{}".to_vec()),
            code: None,
            parked: false,
        }
    }

    fn columns<'a>(row: &Row, body: &'a [u8]) -> Columns<'a> {
        row.columns(body)
    }

    #[test]
    fn a_row_reads_back_as_it_was_written() {
        let body = row().encode();
        assert_eq!(Row::decode(&columns(&row(), &body)), Ok(row()));
    }

    #[test]
    fn a_cut_or_longer_body_is_an_error_and_never_a_panic() {
        let body = row().encode();
        for cut in 0..body.len() {
            assert!(Row::decode(&columns(&row(), &body[..cut])).is_err(), "{cut}");
        }
        assert!(Row::decode(&columns(&row(), &[body.as_slice(), b"x"].concat())).is_err());
    }

    #[test]
    fn every_flipped_bit_of_a_row_changes_its_checksum() {
        let body = row().encode();
        let whole = columns(&row(), &body).checksum("test", "a");
        for byte in 0..body.len() {
            for bit in 0..8 {
                let mut flipped = body.clone();
                flipped[byte] ^= 1 << bit;
                assert_ne!(columns(&row(), &flipped).checksum("test", "a"), whole);
            }
        }
        assert_ne!(columns(&row(), &body).checksum("test", "b"), whole);
        assert_ne!(columns(&row(), &body).checksum("prod", "a"), whole);
    }
}
