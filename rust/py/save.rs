//! `plan`, `Plan.start`, `Save.finish`: a save in a thread of its own, while Python serialises the config.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;
use pyo3::types::{PyBytes, PyDict};

use super::buffer::{Buffer, Memory, Stream};
use super::detached::{caller, detached, interrupt};
use super::errors::to_py;
use super::files::{Outcome, outcome};
use crate::archive::write::Content;
use crate::commit::{Options, Pending};
use crate::dtype::DType;
use crate::error::{Error, Kind, Result, out_of_memory};
use crate::image::Compression;
use crate::io::cast::{Cast, Loss};
use crate::io::emit::{Progress, Put, Sink, Tensors, sized};
use crate::io::fetch::POLL;
use crate::load::Choice;
use crate::save::{self, Prepared, Target};
use crate::tree::{Attribute, Dataset, Tree};

use super::load::choice;

/// A laid-out weights image, ready to be written.
#[pyclass(frozen, module = "hornbeam._core")]
pub(super) struct Plan(Arc<save::Plan>, Arc<Casts>);

/// The datasets whose memory is wider than what is written, by their positions.
type Casts = HashMap<usize, Wide>;

/// What the casts of a save cost, by the positions of the datasets.
type Losses = Vec<(usize, Loss)>;

/// How a dataset is narrowed.
struct Wide {
    cast: Cast,
    memory: Dataset,
    name: String, // of its variable, for errors
    may_overflow: bool,
}

#[pyfunction]
#[pyo3(signature = (groups, datasets, *, engine = "auto", compression = None, shuffle = true, chunk_bytes = 1_048_576, casts = Vec::new()))]
#[allow(clippy::too_many_arguments)] // named ones
pub(super) fn plan(
    py: Python<'_>,
    groups: Vec<(PyBackedStr, Vec<Attribute>)>,
    datasets: Vec<(PyBackedStr, PyBackedStr, Vec<u64>, Vec<Attribute>)>,
    engine: &str,
    compression: Option<u32>,
    shuffle: bool,
    chunk_bytes: u64,
    casts: Vec<(usize, PyBackedStr, String, bool)>,
) -> PyResult<Plan> {
    let choice = choice(engine)?;
    let compression = compression.map(|level| Compression::new(level, shuffle, chunk_bytes)).transpose();
    let compression = compression.map_err(to_py)?;
    let record = || -> Result<Tree> {
        let mut tree = if choice == Choice::Safetensors { Tree::flat() } else { Tree::new() };
        for (path, attributes) in groups {
            if path.is_empty() {
                tree.set_attributes(attributes)?;
            } else {
                tree.add_group(&path, attributes)?;
            }
        }
        for (path, dtype, shape, attributes) in datasets {
            let known = DType::from_name(&dtype).ok_or_else(|| {
                Error::new(Kind::Invalid, format!("Invalid dtype: {dtype}; a weights file cannot hold it"))
                    .with_entry(&path)
            })?;
            tree.add_dataset(&path, known, shape, attributes)?;
        }
        Ok(tree)
    };
    let tree = record().map_err(to_py)?; // attached: it releases the names
    let casts = casts.into_iter().map(|(i, dtype, name, may_overflow)| {
        let (wide, dataset) = (DType::from_name(&dtype), tree.datasets().get(i));
        let cast = wide.zip(dataset).and_then(|(wide, dataset)| Cast::between(wide, dataset.dtype));
        let (Some(cast), Some(wide), Some(dataset)) = (cast, wide, dataset) else {
            return Err(PyValueError::new_err(format!("no dataset {i} to which {dtype} can be cast")));
        };
        let nbytes = dataset.nbytes / dataset.dtype.size() as u64 * wide.size() as u64;
        let memory = Dataset { dtype: wide, nbytes, ..dataset.clone() };
        Ok((i, Wide { cast, memory, name, may_overflow }))
    });
    let casts = casts.collect::<PyResult<Casts>>()?;
    let laid_out = detached(py, || match compression {
        Some(how) => Ok(save::Plan::compressed(tree, choice.compressor()?, how)),
        None => save::Plan::new(tree, &*choice.writer()?),
    });
    Ok(Plan(Arc::new(laid_out?), Arc::new(casts)))
}

#[pymethods]
impl Plan {
    #[getter]
    fn engine(&self) -> &'static str {
        self.0.engine().name()
    }

    #[getter]
    fn nbytes(&self) -> u64 {
        self.0.tree().nbytes()
    }

    fn weights_end(&self, archive: bool) -> Option<u64> {
        self.0.weights_end(archive)
    }

    /// Starts the writer thread. `buffers[i]` is the memory of dataset `i`, or `None` to be asked for later. With
    /// `hold`, a path is opened now, and the thread starts when [`Save::finish`] is called.
    #[pyo3(signature = (target, buffers, *, archive, base = 0, atomic = true, durable = false, hold = false))]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)] // named ones
    fn start(
        &self,
        target: &Bound<'_, PyAny>,
        buffers: Vec<Option<Bound<'_, PyAny>>>,
        archive: bool,
        base: u64,
        atomic: bool,
        durable: bool,
        hold: bool,
    ) -> PyResult<Save> {
        if buffers.len() != self.0.tree().datasets().len() {
            return Err(PyRuntimeError::new_err("one buffer per dataset is needed"));
        }
        let buffers = buffers.iter().map(|b| b.as_ref().map(Buffer::new).transpose()).collect::<PyResult<Vec<_>>>()?;
        let (tail_to, tail) = channel();
        let target = if let Ok(path) = target.extract::<PathBuf>() {
            let options = Options { atomic, durable, queued: hold };
            if hold {
                let pending = detached(target.py(), || Pending::create(&path, options))?;
                Target::Open(path, pending)
            } else {
                Target::Path(path, options)
            }
        } else if target.hasattr("write")? {
            let seekable = target.call_method0("seekable").and_then(|s| s.is_truthy()).unwrap_or(false);
            let raw = target.is_instance(&target.py().import("io")?.getattr("RawIOBase")?)?;
            Target::Sink(Box::new(Stream { file: target.clone().unbind(), seekable, raw, position: base }), base)
        } else {
            Target::Sink(Box::new(KeepsTail(Memory::new(target, base)?, tail_to)), base)
        };
        let save = Save {
            progress: Arc::default(),
            state: Mutex::new(Some(State::Held(Held {
                plan: Arc::clone(&self.0),
                casts: Arc::clone(&self.1),
                target,
                buffers,
                archive,
                tail,
            }))),
            prepared: Mutex::new(None),
            process: std::process::id(),
        };
        if !hold {
            save.begin()?;
        }
        Ok(save)
    }
}

/// Memory that sends what came behind its end when it is done.
struct KeepsTail(Memory, Sender<Vec<u8>>);

impl Sink for KeepsTail {
    fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<()> {
        self.0.write_at(bytes, offset)
    }
}

impl Drop for KeepsTail {
    fn drop(&mut self) {
        let _ = self.1.send(std::mem::take(&mut self.0.tail));
    }
}

/// What the writer thread asks of the caller.
enum Event {
    Tensor(usize),
    Done(Box<Result<(Prepared, Losses)>>),
}

/// What the caller answers.
enum Answer {
    Tensor(Buffer),
    Members(Vec<(String, Content)>),
}

/// A save in progress.
#[pyclass(frozen, module = "hornbeam._core")]
pub(super) struct Save {
    progress: Arc<Progress>,
    state: Mutex<Option<State>>,
    prepared: Mutex<Option<Prepared>>,
    process: u32, // whose threads these are; not those of a forked child
}

enum State {
    Held(Held),
    Running(Running),
}

/// What the writer thread will need.
struct Held {
    plan: Arc<save::Plan>,
    casts: Arc<Casts>,
    target: Target,
    buffers: Vec<Option<Buffer>>,
    archive: bool,
    tail: Receiver<Vec<u8>>,
}

struct Running {
    thread: JoinHandle<Vec<Option<Buffer>>>,
    events: Receiver<Event>,
    tensors: Sender<Answer>,
    members: Sender<Answer>,
    tail: Receiver<Vec<u8>>,
    archive: bool,
}

/// The writer thread's view of the tensors: those it was given, others when the caller hands them over.
struct Source<'a> {
    buffers: &'a [Option<Buffer>],
    current: Option<Buffer>,
    casts: &'a Casts,
    losses: Losses,
    narrow: Vec<u8>, // a whole tensor, for who needs it whole
    ask: &'a Sender<Event>,
    answers: &'a Receiver<Answer>,
}

fn cancelled<E>(_: E) -> Error {
    Error::new(Kind::Cancelled, "the save was cancelled")
}

impl Source<'_> {
    /// The memory of dataset `i`, as it is.
    fn memory(&mut self, i: usize) -> Result<&[u8]> {
        if let Some(buffers) = &self.buffers[i] {
            return Ok(buffers.bytes());
        }
        self.current = None;
        self.ask.send(Event::Tensor(i)).map_err(cancelled)?;
        match self.answers.recv().map_err(cancelled)? {
            Answer::Tensor(buffers) => Ok(self.current.insert(buffers).bytes()),
            Answer::Members(_) => Err(cancelled(())),
        }
    }
}

impl Source<'_> {
    /// The same, cast on its way to `put`.
    fn narrowed(&mut self, i: usize, put: Put<'_>) -> Result<()> {
        let wide = &self.casts[&i];
        let loss = wide.cast.each_block(sized(self.memory(i)?, &wide.memory)?, put)?;
        self.losses.push((i, loss));
        if loss.infinite == 0 || wide.may_overflow {
            return Ok(());
        }
        let (name, path, to) = (&wide.name, &wide.memory.path, wide.cast.narrow());
        let found = format!("{} would become infinite", loss.infinite);
        Err(Error::new(
            Kind::Invalid,
            format!("'{name}' ('{path}' in the file) holds values that {to} cannot: {found}"),
        )
        .with_advice("Save it as bfloat16, which reaches as far as float32, or with `allow_overflow=True`."))
    }
}

impl Tensors for Source<'_> {
    fn tensor(&mut self, i: usize) -> Result<&[u8]> {
        if !self.casts.contains_key(&i) {
            return self.memory(i);
        }
        let mut narrow = std::mem::take(&mut self.narrow);
        narrow.clear();
        self.narrowed(i, &mut |part| {
            narrow.try_reserve(part.len()).map_err(|_| out_of_memory(part.len()))?;
            narrow.extend_from_slice(part);
            Ok(())
        })?;
        self.narrow = narrow;
        Ok(&self.narrow)
    }

    fn each_part(&mut self, i: usize, dataset: &Dataset, put: Put<'_>) -> Result<()> {
        if self.casts.contains_key(&i) { self.narrowed(i, put) } else { put(sized(self.memory(i)?, dataset)?) }
    }
}

impl Running {
    /// Starts the writer thread.
    fn spawn(held: Held, progress: &Arc<Progress>) -> PyResult<Self> {
        let Held { plan, casts, target, buffers, archive, tail } = held;
        let (ask, events) = channel();
        let (tensors, tensor_answers) = channel();
        let (members, member_answers) = channel();
        let watched = Arc::clone(progress);
        let body = move || {
            let work = || {
                let (ask, answers) = (&ask, &tensor_answers);
                let (losses, narrow) = (Vec::new(), Vec::new());
                let buffers = &buffers;
                let mut source = Source { buffers, current: None, casts: &casts, losses, narrow, ask, answers };
                let mut members = || match member_answers.recv().map_err(cancelled)? {
                    Answer::Members(members) => Ok(members),
                    Answer::Tensor(_) => Err(cancelled(())),
                };
                let members: Option<save::Members<'_>> = if archive { Some(&mut members) } else { None };
                let prepared = save::write(&plan, target, &mut source, members, &watched)?;
                Ok((prepared, source.losses))
            };
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let outcome = caught.unwrap_or_else(|_| Err(Error::new(Kind::Internal, "the writer thread panicked")));
            let _ = ask.send(Event::Done(Box::new(outcome)));
            buffers // released by the caller, who is attached
        };
        let thread = std::thread::Builder::new().name("hornbeam-save".into()).spawn(body)?;
        Ok(Self { thread, events, tensors, members, tail, archive })
    }
}

impl Save {
    /// Its threads and files are those of the process that started it: a forked child would wait for ever.
    fn check_process(&self) -> PyResult<()> {
        if self.process == std::process::id() {
            return Ok(());
        }
        let what = "this save belongs to the process that started it, not to a forked child";
        Err(to_py(Error::new(Kind::Cancelled, what).with_advice("Save again in the child.")))
    }

    fn take(&self) -> Option<State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    fn take_prepared(&self) -> Option<Prepared> {
        self.prepared.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Starts the writer thread, if that was put off.
    fn begin(&self) -> PyResult<()> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        *state = match state.take() {
            Some(State::Held(held)) => Some(State::Running(Running::spawn(held, &self.progress)?)),
            other => other,
        };
        Ok(())
    }
}

#[pymethods]
impl Save {
    #[getter]
    fn written(&self) -> u64 {
        self.progress.written.load(Ordering::Relaxed)
    }

    /// Hands over the members and waits for the end; `pull(i)` gives the memory of a tensor that was not given to `start`. Without
    /// `commit`, the old file stays until [`commit_indexed`].
    #[pyo3(signature = (members, pull = None, *, commit = true))]
    fn finish<'py>(
        &self,
        py: Python<'py>,
        members: Vec<(String, MemberContent)>,
        pull: Option<&Bound<'py, PyAny>>,
        commit: bool,
    ) -> PyResult<Bound<'py, PyDict>> {
        self.check_process()?;
        self.begin()?;
        let Some(State::Running(mut running)) = self.take() else {
            return Err(PyRuntimeError::new_err("the save was finished before"));
        };
        if running.archive {
            let members = members.into_iter().map(|(name, content)| (name, content.into())).collect();
            let _ = running.members.send(Answer::Members(members));
        }
        let waited = loop {
            let events = &mut running.events;
            match py.detach(|| next(events)) {
                Ok(Some(Event::Done(outcome))) => break *outcome,
                Ok(Some(Event::Tensor(i))) => {
                    let given = pull.ok_or_else(|| PyRuntimeError::new_err("no pull function was given"));
                    match given.and_then(|p| p.call1((i,))).and_then(|b| Buffer::new(&b)) {
                        Ok(buffers) => drop(running.tensors.send(Answer::Tensor(buffers))),
                        Err(e) => break Err(caller(e)),
                    }
                }
                Ok(None) => {}
                Err(e) => break Err(e),
            }
        };
        self.progress.cancelled.store(waited.is_err(), Ordering::Relaxed);
        let Running { thread, events, tensors, members, tail, .. } = running;
        drop((events, tensors, members));
        let buffers = py.detach(|| thread.join());
        drop(buffers);
        let (prepared, losses) = waited.map_err(to_py)?;
        let info = PyDict::new(py);
        info.set_item("bytes", prepared.bytes())?;
        info.set_item("crc", prepared.crc())?;
        let losses = losses.iter().map(|(i, l)| (*i, l.max_abs, l.max_rel, l.zeros, l.infinite));
        info.set_item("casts", losses.collect::<Vec<_>>())?;
        if commit {
            let committed = detached(py, || prepared.commit())?.committed;
            info.set_item("in_place", committed.in_place)?;
            info.set_item("lost", committed.lost)?;
        } else {
            *self.prepared.lock().unwrap_or_else(PoisonError::into_inner) = Some(prepared);
        }
        info.set_item("tail", tail.try_recv().ok().map(|t| PyBytes::new(py, &t)))?;
        Ok(info)
    }

    /// Stops the writer and removes what it wrote.
    fn cancel(&self, py: Python<'_>) {
        let state = self.take();
        if self.process != std::process::id() {
            std::mem::forget(state); // the threads and files of the process that this one was forked from
            return;
        }
        let Some(State::Running(running)) = state else { return };
        self.progress.cancelled.store(true, Ordering::Relaxed);
        let Running { thread, events, tensors, members, .. } = running;
        drop((events, tensors, members)); // wakes a waiting thread
        drop(py.detach(|| thread.join()));
    }
}

/// Puts what was saved with `finish(commit=False)` in its places, and then the index that names it; why each was written over
/// instead, and what it could not take over from the old one; of the index, too.
#[pyfunction]
#[pyo3(signature = (saves, index, content, *, atomic = true, durable = false))]
pub(super) fn commit_indexed(
    py: Python<'_>,
    saves: Vec<PyRef<'_, Save>>,
    index: PathBuf,
    content: Vec<u8>,
    atomic: bool,
    durable: bool,
) -> PyResult<Vec<Outcome>> {
    saves.iter().try_for_each(|save| save.check_process())?;
    let files = saves.iter().filter_map(|save| save.take_prepared()).collect();
    let options = Options { atomic, durable, queued: false };
    let placed = detached(py, || save::commit_indexed(files, &index, &content, options))?;
    Ok(placed.into_iter().map(outcome).collect())
}

/// The writer's next event; `None` after a while without one.
fn next(events: &mut Receiver<Event>) -> Result<Option<Event>> {
    match events.recv_timeout(POLL) {
        Ok(event) => Ok(Some(event)),
        Err(RecvTimeoutError::Timeout) => interrupt().map(|()| None),
        Err(RecvTimeoutError::Disconnected) => {
            Err(Error::new(Kind::Internal, "the writer thread ended without a result"))
        }
    }
}

impl Drop for Save {
    fn drop(&mut self) {
        Python::attach(|py| self.cancel(py));
    }
}

/// A member's content: bytes, or the path of a file.
#[derive(FromPyObject)]
pub(super) enum MemberContent {
    Bytes(Vec<u8>),
    File(PathBuf),
}

impl From<MemberContent> for Content {
    fn from(content: MemberContent) -> Self {
        match content {
            MemberContent::Bytes(b) => Self::Bytes(b),
            MemberContent::File(p) => Self::File(p),
        }
    }
}
