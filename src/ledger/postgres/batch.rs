//! One batch of commands against the database: read what must be read, apply the state machine,
//! write what changed if nobody else wrote meanwhile, and go round again with the rest.
//!
//! Most commands need one round trip: a new job's row is taken to be absent, and the row of a job
//! that this worker claimed is the one it wrote. Both are only guesses, so an answer that rests on
//! one counts only if it comes with a write, and every write compares the row's version.

use std::collections::{BTreeMap, HashMap, HashSet};

use tokio_postgres::{Client, Error};

use super::statements::{self, Change, Changes, Versioned};
use super::time::DatabaseClock;
use crate::clock::{Clock, Millis};
use crate::job::Key;
use crate::ledger::transition::{self, Context, Forgotten, Orphan};
use crate::ledger::{Answer, Command, JobCommand, LedgerError, Row, State};

/// Rounds before a command is told to ask again: each lost one means that another worker wrote the
/// same row, so more than a few say that something is wrong.
const ROUNDS: usize = 16;
/// Most rows of jobs under way that are remembered; one that is forgotten costs a read.
const REMEMBERED: usize = 16 * 1024;

/// Rows of jobs that this worker has claimed, as it wrote them.
#[derive(Debug, Default)]
pub(super) struct Memory(HashMap<Key, Versioned>);

impl Memory {
    fn keep(&mut self, key: &Key, row: Row, version: i64, sum: [u8; 8]) {
        if row.state != State::Sending {
            self.0.remove(key);
        } else if self.0.len() < REMEMBERED || self.0.contains_key(key) {
            self.0.insert(key.clone(), Versioned { row: Some(row), version, sum: sum.to_vec() });
        }
    }
}

/// What is known of a key's row in this batch.
struct Slot {
    /// As read or guessed, then as the commands have changed it.
    row: Option<Row>,
    /// The version that a write must find.
    version: i64,
    /// And the checksum.
    sum: Vec<u8>,
    guessed: bool,
    changed: bool,
    /// Attempts that became ambiguous: the how manieth of the row, and when the row was made.
    ambiguous: Vec<(u32, Millis)>,
    orphans: Vec<Orphan>,
    /// The commands that this round has answered, if its write succeeds.
    answers: Vec<(usize, Answer)>,
}

impl Slot {
    fn new(versioned: Versioned, guessed: bool) -> Self {
        let Versioned { row, version, sum } = versioned;
        Self {
            row,
            version,
            sum,
            guessed,
            changed: false,
            ambiguous: Vec::new(),
            orphans: Vec::new(),
            answers: Vec::new(),
        }
    }

    fn apply(&mut self, index: usize, command: &JobCommand, context: Context) {
        let effect = transition::apply(self.row.clone(), command, context);
        if let Some(row) = &effect.write {
            let more = row.ambiguous - effect.ambiguous + 1..=row.ambiguous;
            self.ambiguous.extend(more.map(|number| (number, row.created_at)));
        }
        self.orphans.extend(effect.orphan);
        if let Some(row) = effect.write {
            self.row = Some(row);
            self.changed = true;
        }
        self.answers.push((index, effect.answer));
    }
}

/// A batch under way.
pub(super) struct Batch<'a> {
    client: &'a Client,
    clock: &'a dyn Clock,
    heard: Option<&'a DatabaseClock>,
    memory: &'a std::sync::Mutex<Memory>,
    commands: &'a [Command],
    forgotten: Forgotten,
    answers: Vec<Option<Result<Answer, LedgerError>>>,
}

impl<'a> Batch<'a> {
    pub(super) fn new(
        client: &'a Client,
        clock: &'a dyn Clock,
        heard: Option<&'a DatabaseClock>,
        memory: &'a std::sync::Mutex<Memory>,
        commands: &'a [Command],
        forgotten: Forgotten,
    ) -> Self {
        let done =
            |command: &Command| matches!(command, Command::Own(_)).then_some(Ok(Answer::Done));
        let answers = commands.iter().map(done).collect();
        Self { client, clock, heard, memory, commands, forgotten, answers }
    }

    /// Carries the commands out that are about a row; the others have been.
    pub(super) async fn run(mut self) -> Result<Vec<Result<Answer, LedgerError>>, Error> {
        for round in 0..ROUNDS {
            let mut slots = self.load(round == 0).await?;
            if slots.is_empty() {
                break;
            }
            let context = Context { now: self.clock.now(), epoch: None, forgotten: self.forgotten };
            for (index, command) in self.commands.iter().enumerate() {
                if let Command::Job(command) = command
                    && self.answers[index].is_none()
                    && let Some(slot) = slots.get_mut(command.key())
                {
                    slot.apply(index, command, context);
                }
            }
            self.store(slots, context.now).await?;
        }
        let contended = || {
            let text = "other workers keep writing the same row; it is asked again".to_owned();
            Err(LedgerError::Unavailable(text))
        };
        Ok(self.answers.into_iter().map(|answer| answer.unwrap_or_else(contended)).collect())
    }

    /// The rows of all commands that have no answer yet: guessed where that may be, else read.
    async fn load(&mut self, may_guess: bool) -> Result<BTreeMap<&'a Key, Slot>, Error> {
        let mut slots = BTreeMap::new();
        let mut unknown = Vec::new();
        {
            let memory = self.memory.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            for (index, command) in self.commands.iter().enumerate() {
                let Command::Job(command) = command else { continue };
                let key = command.key();
                if self.answers[index].is_some()
                    || slots.contains_key(key)
                    || unknown.contains(&key)
                {
                    continue;
                }
                match guess(&memory, command).filter(|_| may_guess) {
                    Some(guess) => {
                        slots.insert(key, Slot::new(guess, true));
                    }
                    None => unknown.push(key),
                }
            }
        }
        if unknown.is_empty() {
            return Ok(slots);
        }
        let asked = tokio::time::Instant::now();
        let (now, found) = statements::read(self.client, &unknown).await?;
        self.hear(now, asked);
        for (key, found) in unknown.into_iter().zip(found) {
            match found {
                Ok(versioned) => {
                    slots.insert(key, Slot::new(versioned, false));
                }
                Err(damaged) => self.refuse(key, &damaged),
            }
        }
        Ok(slots)
    }

    fn hear(&self, now: Millis, asked: tokio::time::Instant) {
        if let Some(clock) = self.heard {
            clock.hear(now, asked);
        }
    }

    fn refuse(&mut self, key: &Key, error: &LedgerError) {
        for (index, command) in self.commands.iter().enumerate() {
            if self.answers[index].is_none() && command.key() == Some(key) {
                self.answers[index] = Some(Err(error.clone()));
            }
        }
    }

    /// Writes what changed and answers what is certain now; the rest is for the next round.
    async fn store(&mut self, slots: BTreeMap<&'a Key, Slot>, now: i64) -> Result<(), Error> {
        // What rests on a guess and writes nothing has proved nothing.
        let certain: Vec<_> =
            slots.into_iter().filter(|(_, slot)| slot.changed || !slot.guessed).collect();
        let mut changes = Changes::default();
        for (key, slot) in &certain {
            if let Some(row) = slot.row.as_ref().filter(|_| slot.changed) {
                changes.rows.push(Change::new(key, slot.version, &slot.sum, row));
                changes.ambiguous.extend(
                    slot.ambiguous.iter().map(|(number, created_at)| (*key, *number, *created_at)),
                );
            }
            changes.orphans.extend(slot.orphans.iter().map(|orphan| (*key, orphan)));
        }
        let sums: Vec<[u8; 8]> = changes.rows.iter().map(Change::sum).collect();
        let mut sums = sums.into_iter();
        let mut written = HashSet::new();
        if !changes.rows.is_empty() || !changes.orphans.is_empty() {
            let asked = tokio::time::Instant::now();
            let (heard, keys) = statements::write(self.client, &changes, now).await?;
            self.hear(heard, asked);
            written.extend(keys);
        }
        let mut memory = self.memory.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (key, slot) in certain {
            let name = (key.mode.as_str().to_owned(), key.request_id.as_str().to_owned());
            let is_written = written.contains(&name);
            // In the order of the changes.
            let sum = if slot.changed { sums.next() } else { None };
            if slot.changed && !is_written {
                memory.0.remove(key);
                continue;
            }
            if let Some((row, sum)) = slot.row.zip(sum) {
                memory.keep(key, row, slot.version + 1, sum);
            }
            for (index, answer) in slot.answers {
                self.answers[index] = Some(Ok(answer));
            }
        }
        Ok(())
    }
}

/// What a key's row is likely to be, where that can be guessed.
fn guess(memory: &Memory, command: &JobCommand) -> Option<Versioned> {
    if let Some(known) = memory.0.get(command.key()) {
        return Some(known.clone());
    }
    match command {
        // A job that nobody took before has no row yet, as a rule.
        JobCommand::Claim(request) if !request.claimant.redelivered => {
            Some(Versioned { row: None, version: 0, sum: Vec::new() })
        }
        JobCommand::Claim(_)
        | JobCommand::Settle(_)
        | JobCommand::Close(_)
        | JobCommand::Parked { .. }
        | JobCommand::Look(_)
        | JobCommand::Knows { .. } => None,
    }
}
