//! Python objects ↔ JSON for `_core.encode_json` and `_core.decode_json`. The text is `json/`, the objects are here.

use std::mem;
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyRecursionError, PyTypeError, PyValueError};
use pyo3::ffi::PyObject;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyByteArray, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple, PyType};

use crate::json::{self, Ancestors, Build, Encoder, Fault, Limits, Recent, Scalar, Text};
use crate::py::errors::to_py;

/// What `json.dumps(obj).encode()` returns or raises.
#[pyfunction]
pub(crate) fn encode_json<'py>(obj: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    let (open, above) = (Vec::new(), Ancestors::default());
    let mut writer = Writer { out: Encoder::new(), open, above, items: Vec::new(), depth: usize::MAX };
    writer.value(obj.clone())?;
    while let Some(&Open { ref obj, dict, start }) = writer.open.last() {
        if writer.items.len() == start {
            writer.above.close(&obj.as_ptr());
            writer.open.pop();
            if dict {
                writer.out.end_dict();
            } else {
                writer.out.end_list();
            }
            continue;
        }
        if dict && let Some(key) = writer.items.pop() {
            writer.key(&key)?;
        }
        if let Some(value) = writer.items.pop() {
            writer.value(value)?;
        }
    }
    Ok(PyBytes::new(obj.py(), &writer.out.finish()))
}

struct Writer<'py> {
    out: Encoder,
    open: Vec<Open<'py>>,
    above: Ancestors<*mut PyObject>, // the objects of those
    items: Vec<Bound<'py, PyAny>>,   // of every open container, the next one last; a key comes right after its value
    depth: usize,                    // Python's recursion limit, once it matters
}

/// A list, tuple or dict that is being written.
struct Open<'py> {
    obj: Bound<'py, PyAny>,
    dict: bool,
    start: usize, // where its items start
}

impl<'py> Writer<'py> {
    /// Writes a scalar, or opens a container.
    fn value(&mut self, obj: Bound<'py, PyAny>) -> PyResult<()> {
        if let Ok(s) = obj.cast::<PyString>() {
            self.string(s)?;
        } else if obj.is_none() {
            self.out.null();
        } else if let Ok(b) = obj.cast::<PyBool>() {
            self.out.bool(b.is_true());
        } else if obj.is_instance_of::<PyDict>() {
            self.open(obj, true)?;
        } else if obj.is_instance_of::<PyList>() || obj.is_instance_of::<PyTuple>() {
            self.open(obj, false)?;
        } else if obj.is_instance_of::<PyInt>() {
            match obj.extract() {
                Ok(n) => self.out.int(n),
                Err(_) => self.out.int_text(int_repr(&obj)?.to_str()?),
            }
        } else if let Ok(x) = obj.cast::<PyFloat>() {
            self.out.float(x.value());
        } else {
            let class = obj.getattr("__class__")?.getattr("__name__")?;
            return Err(PyTypeError::new_err(format!("Object of type {class} is not JSON serializable")));
        }
        Ok(())
    }

    fn key(&mut self, key: &Bound<'py, PyAny>) -> PyResult<()> {
        if let Ok(s) = key.cast::<PyString>() {
            self.string(s)?;
        } else if let Ok(x) = key.cast::<PyFloat>() {
            self.out.str(&json::float_text(x.value()));
        } else if let Ok(b) = key.cast::<PyBool>() {
            self.out.str(if b.is_true() { "true" } else { "false" });
        } else if key.is_none() {
            self.out.str("null");
        } else if key.is_instance_of::<PyInt>() {
            self.out.str(int_repr(key)?.to_str()?);
        } else {
            let name = c_name(&key.get_type())?;
            return Err(PyTypeError::new_err(format!("keys must be str, int, float, bool or None, not {name}")));
        }
        self.out.colon();
        Ok(())
    }

    fn string(&mut self, s: &Bound<'py, PyString>) -> PyResult<()> {
        if let Ok(s) = s.to_str() {
            self.out.str(s);
            return Ok(());
        }
        let str_type = s.py().get_type::<PyString>(); // not the method of a subclass
        let bytes = str_type.call_method1("encode", (s, "utf-16-le", "surrogatepass"))?;
        let units = bytes.cast::<PyBytes>()?.as_bytes().chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        self.out.text(Text::Utf16(&units.collect::<Vec<_>>()));
        Ok(())
    }

    /// Puts the items of a container on the pile. A subclass is asked through `items` or `__iter__`, as Python does.
    fn open(&mut self, obj: Bound<'py, PyAny>, dict: bool) -> PyResult<()> {
        if !self.above.open(obj.as_ptr()) {
            return Err(PyValueError::new_err("Circular reference detected"));
        }
        if self.open.len() == 100 {
            self.depth = recursion_limit(obj.py())?;
        }
        if self.open.len() >= self.depth {
            return Err(too_deep("encoding a JSON object"));
        }
        let start = self.items.len();
        if dict {
            self.out.begin_dict();
            self.entries(&obj)?;
        } else {
            self.out.begin_list();
            if let Ok(list) = obj.cast_exact::<PyList>() {
                self.items.extend(list.iter());
            } else if let Ok(tuple) = obj.cast_exact::<PyTuple>() {
                self.items.extend(tuple.iter());
            } else {
                for item in obj.try_iter()? {
                    self.items.push(item?);
                }
            }
        }
        self.items[start..].reverse();
        self.open.push(Open { obj, dict, start });
        Ok(())
    }

    fn entries(&mut self, obj: &Bound<'py, PyAny>) -> PyResult<()> {
        if let Ok(dict) = obj.cast_exact::<PyDict>() {
            self.items.extend(dict.iter().flat_map(|(key, value)| [key, value]));
        } else if !obj.cast::<PyDict>()?.is_empty() {
            for item in obj.call_method0("items")?.try_iter()? {
                let item = item?;
                let pair = item.cast::<PyTuple>().ok().filter(|pair| pair.len() == 2);
                let pair = pair.ok_or_else(|| PyValueError::new_err("items must return 2-tuples"))?;
                self.items.extend(pair.iter());
            }
        }
        Ok(())
    }
}

/// The digits of an `int`, whatever `repr` its subclass has.
fn int_repr<'py>(obj: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyString>> {
    Ok(obj.py().get_type::<PyInt>().call_method1("__repr__", (obj,))?.cast_into()?)
}

/// The `tp_name` of a type, which `json` reports: it has the module when the type was made in C.
fn c_name(class: &Bound<'_, PyType>) -> PyResult<String> {
    const HEAP: u64 = 1 << 9;
    let module = class.module()?;
    let in_c = class.getattr("__flags__")?.extract::<u64>()? & HEAP == 0;
    Ok(if in_c && module != "builtins" { format!("{module}.{}", class.name()?) } else { class.name()?.to_string() })
}

fn recursion_limit(py: Python<'_>) -> PyResult<usize> {
    static FUNCTION: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    FUNCTION.import(py, "sys", "getrecursionlimit")?.call0()?.extract()
}

fn too_deep(doing: &str) -> PyErr {
    PyRecursionError::new_err(format!("maximum recursion depth exceeded while {doing}"))
}

/// What `json.loads(data)` returns or raises. Unless `trusted`, the limits on files hold and keys must be unique.
#[pyfunction]
#[pyo3(signature = (data, *, trusted = true))]
pub(crate) fn decode_json<'py>(data: &Bound<'py, PyAny>, trusted: bool) -> PyResult<Bound<'py, PyAny>> {
    let py = data.py();
    if let Ok(s) = data.cast::<PyString>() {
        return decode_str(s, data, trusted);
    }
    let copy = data.cast::<PyByteArray>().map(|array| PyBytes::new(py, &array.to_vec()));
    let Ok(bytes) = copy.as_ref().or_else(|_| data.cast::<PyBytes>()) else {
        let class = data.getattr("__class__")?.getattr("__name__")?;
        return Err(PyTypeError::new_err(format!("the JSON object must be str, bytes or bytearray, not {class}")));
    };
    let raw = bytes.as_bytes();
    match std::str::from_utf8(raw) {
        // A NUL near the start tells UTF-16 and UTF-32, the rest a byte order mark.
        Ok(text) if !raw.iter().take(4).any(|&b| b == 0) && !text.starts_with('\u{feff}') => parse(py, text, trusted),
        _ => {
            let encoding = py.import("json")?.call_method1("detect_encoding", (bytes,))?;
            decode_str(bytes.call_method1("decode", (encoding, "surrogatepass"))?.cast()?, data, trusted)
        }
    }
}

fn decode_str<'py>(s: &Bound<'py, PyString>, data: &Bound<'py, PyAny>, trusted: bool) -> PyResult<Bound<'py, PyAny>> {
    let py = s.py();
    match s.to_str() {
        Ok(text) if text.starts_with('\u{feff}') && s.is(data) && trusted => {
            Err(malformed(py, "Unexpected UTF-8 BOM (decode using utf-8-sig)", text, 0))
        }
        Ok(text) => parse(py, text, trusted),
        Err(_) if trusted => py.import("json")?.call_method1("loads", (data,)), // surrogates that are not escaped: rare
        Err(_) => Err(to_py(Fault::Syntax("lone surrogate", 0).into())),
    }
}

fn parse<'py>(py: Python<'py>, text: &str, trusted: bool) -> PyResult<Bound<'py, PyAny>> {
    let mut limits = Limits::FILE;
    if trusted {
        limits = Limits { bytes: u64::MAX, depth: recursion_limit(py)?, unique_keys: false };
    }
    let mut recent = mem::take(&mut *RECENT.lock().unwrap_or_else(PoisonError::into_inner));
    recent.begin();
    let mut objects = Objects { py, recent, unique: limits.unique_keys };
    let result = json::decode(text, &limits, &mut objects);
    *RECENT.lock().unwrap_or_else(PoisonError::into_inner) = objects.recent;
    result.map_err(|stop| match *stop {
        Stop::Python(err) => err,
        Stop::Fault(Fault::Syntax(what, at)) if trusted => malformed(py, what, text, at),
        Stop::Fault(Fault::DeepList) if trusted => too_deep("decoding a JSON array from a unicode string"),
        Stop::Fault(Fault::DeepDict) if trusted => too_deep("decoding a JSON object from a unicode string"),
        Stop::Fault(fault) => to_py(fault.into()),
    })
}

/// A `json.JSONDecodeError`, which counts in characters.
fn malformed(py: Python<'_>, what: &str, text: &str, at: usize) -> PyErr {
    let at = text.char_indices().take_while(|&(byte, _)| byte < at).count();
    match py.import("json").and_then(|json| json.call_method1("JSONDecodeError", (what, text, at))) {
        Ok(err) => PyErr::from_value(err),
        Err(err) => err,
    }
}

/// Taken while a text is decoded, so that one in between merely starts afresh.
static RECENT: Mutex<Recent<Py<PyString>>> = Mutex::new(Recent::new());

/// Builds Python objects; configs repeat a few dozen strings, which are shared.
struct Objects<'py> {
    py: Python<'py>,
    recent: Recent<Py<PyString>>,
    unique: bool, // does anybody ask whether a key is new?
}

/// Why decoding stopped. Boxed, so that results stay in registers.
enum Stop {
    Fault(Fault),
    Python(PyErr),
}

impl From<Fault> for Box<Stop> {
    fn from(fault: Fault) -> Self {
        Box::new(Stop::Fault(fault))
    }
}

impl From<PyErr> for Box<Stop> {
    fn from(err: PyErr) -> Self {
        Box::new(Stop::Python(err))
    }
}

impl<'py> Build for Objects<'py> {
    type Value = Bound<'py, PyAny>;
    type Key = Bound<'py, PyString>;
    type Dict = Bound<'py, PyDict>;
    type Error = Box<Stop>;

    #[inline]
    fn scalar(&mut self, scalar: Scalar) -> Result<Self::Value, Box<Stop>> {
        let py = self.py;
        Ok(match scalar {
            Scalar::Null => py.None().into_bound(py),
            Scalar::Bool(b) => PyBool::new(py, b).to_owned().into_any(),
            Scalar::Int(n) => PyInt::new(py, n).into_any(),
            Scalar::IntText(digits) => py.get_type::<PyInt>().call1((digits,))?, // Python's own limit on digits applies
            Scalar::Float(x) => PyFloat::new(py, x).into_any(),
            // Keys are looked up all the same.
            Scalar::Text(Text::Utf8(s)) if !self.recent.pays() => PyString::new(py, s).into_any(),
            Scalar::Text(text) => self.key(text)?.into_any(),
        })
    }
    fn list(&mut self, items: std::vec::Drain<Self::Value>) -> Result<Self::Value, Box<Stop>> {
        Ok(PyList::new(self.py, items)?.into_any())
    }
    fn dict(&mut self) -> Self::Dict {
        PyDict::new(self.py)
    }
    fn key(&mut self, text: Text) -> Result<Self::Key, Box<Stop>> {
        match text {
            Text::Utf8(s) => Ok(self.shared(s)),
            Text::Utf16(units) => {
                let bytes: Vec<u8> = units.iter().flat_map(|unit| unit.to_le_bytes()).collect();
                let bytes = PyBytes::new(self.py, &bytes);
                Ok(PyString::from_encoded_object(&bytes, Some(c"utf-16-le"), Some(c"surrogatepass"))?)
            }
        }
    }
    fn insert(&mut self, dict: &mut Self::Dict, key: Self::Key, value: Self::Value) -> Result<bool, Box<Stop>> {
        let before = if self.unique { dict.len() } else { 0 };
        dict.set_item(key, value)?;
        Ok(!self.unique || dict.len() > before)
    }
    fn finish(&mut self, dict: Self::Dict) -> Result<Self::Value, Self::Error> {
        Ok(dict.into_any())
    }
}

impl<'py> Objects<'py> {
    fn shared(&mut self, s: &str) -> Bound<'py, PyString> {
        let py = self.py;
        match self.recent.get(s, || PyString::new(py, s).unbind()) {
            Some(object) => object.bind(py).clone(),
            None => PyString::new(py, s),
        }
    }
}
