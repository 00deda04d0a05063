package files

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"github.com/meshca/meshca/agent"
)

// The names that kubelet's volumes have, which readers and tools know: `..data` leads to the directory of the present
// generation, and each file is a link through it.
const (
	dataLink  = "..data"
	dataTemp  = "..data_tmp"
	nameForm  = "..2006_01_02_15_04_05.000000000"
	toldMark  = "..told"
	ownerNote = "..bearer"
	maxOfFile = 4 << 20 // bytes of a file that is read back
)

// generationName is what nameForm makes.
var generationName = regexp.MustCompile(`^\.\.\d{4}(_\d\d){5}\.\d{9}$`)

// directory is one that only the agent and root can write to, opened so that nothing in it leads out of it.
type directory struct {
	path string
	root *os.Root
}

// openDirectory makes the directory where it is missing, and refuses one in which others could put something in the
// place of ours.
func openDirectory(dir string) (*directory, error) {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, fmt.Errorf("the directory cannot be made: %w", err)
		}
		if err := os.Chmod(dir, 0o755); err != nil { // whatever the umask is: who may read is said by the files' modes
			return nil, err
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	d := &directory{dir, root}
	if err := d.check(); err != nil {
		_ = root.Close()
		return nil, err
	}
	return d, nil
}

func (d *directory) check() error {
	named, err := os.Lstat(d.path)
	if err != nil {
		return err
	}
	if named.Mode()&fs.ModeSymlink != 0 {
		return fmt.Errorf("%s is a symbolic link: name the directory that it leads to", d.path)
	}
	info, err := d.root.Stat(".")
	if err != nil {
		return err
	}
	if !os.SameFile(named, info) {
		return fmt.Errorf("%s was replaced while it was opened", d.path)
	}
	if owner, us := ownerOf(info), os.Geteuid(); owner != 0 && owner != us {
		return fmt.Errorf("%s belongs to uid %d, this agent is uid %d: whoever owns it could replace what is written there; run `chown %d %s`", d.path, owner, us, us, d.path)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("others can write to %s (mode %v), and so replace what is written there: run `chmod go-w %s`", d.path, info.Mode().Perm(), d.path)
	}
	return nil
}

func (d *directory) close() { _ = d.root.Close() }

// current is the name of the present generation's directory; empty: there is none of ours.
func (d *directory) current() string {
	name, err := d.root.Readlink(dataLink)
	if err != nil || !generationName.MatchString(name) {
		return ""
	}
	if info, err := d.root.Lstat(name); err != nil || !info.IsDir() {
		return ""
	}
	return name
}

// read reads the files of a generation. Whatever is no plain file is left out.
func (d *directory) read(generation string) (map[string]file, error) {
	dir, err := d.root.OpenRoot(generation)
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	f, err := dir.Open(".")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return nil, err
	}
	held := make(map[string]file)
	for _, e := range entries {
		if !e.Type().IsRegular() || strings.HasPrefix(e.Name(), "..") {
			continue
		}
		data, err := readFile(dir, e.Name())
		if err != nil {
			return nil, err
		}
		held[e.Name()] = file{data: data}
	}
	return held, nil
}

func readFile(dir *os.Root, name string) ([]byte, error) {
	f, err := dir.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxOfFile+1))
	if err == nil && len(data) > maxOfFile {
		err = fmt.Errorf("%s is larger than %d bytes", name, maxOfFile)
	}
	return data, err
}

// holds reports whether a generation is these files, with their modes and owners, and all their names lead to it.
func (d *directory) holds(generation string, want map[string]file, c Config) bool {
	held, err := d.read(generation)
	if err != nil || len(held) != len(want) {
		return false
	}
	for name, f := range want {
		info, err := d.root.Lstat(path.Join(generation, name))
		if err != nil || string(held[name].data) != string(f.data) || info.Mode().Perm() != c.modeOf(f) {
			return false
		}
		if c.UID != nil && ownerOf(info) != *c.UID || c.GID != nil && groupOf(info) != *c.GID {
			return false
		}
		if to, err := d.root.Readlink(name); err != nil || to != linkTo(name) {
			return false
		}
	}
	return true
}

// mark notes that those who read a generation were told of it; marked reports that.
func (d *directory) mark(generation string) error {
	f, err := d.root.OpenFile(path.Join(generation, toldMark), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

func (d *directory) marked(generation string) bool {
	_, err := d.root.Lstat(path.Join(generation, toldMark))
	return err == nil
}

// own notes whose identity is in a generation, for a run that follows, over a reboot too. It is for the agent alone.
func (d *directory) own(generation string, whose agent.Bearer) (err error) {
	data, err := json.Marshal(whose)
	if err != nil {
		return err
	}
	f, err := d.root.OpenFile(path.Join(generation, ownerNote), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.Sync()
}

// bearer is whose identity is in a generation; nobody: nothing says so.
func (d *directory) bearer(generation string) (whose agent.Bearer) {
	data, err := readFile(d.root, path.Join(generation, ownerNote))
	if err != nil || json.Unmarshal(data, &whose) != nil {
		return agent.Bearer{}
	}
	return whose
}

// sweep removes all generations but those to keep, and what a crash left half made.
func (d *directory) sweep(keep ...string) error {
	f, err := d.root.Open(".")
	if err != nil {
		return err
	}
	defer f.Close()
	entries, err := f.ReadDir(-1)
	if err != nil {
		return err
	}
	kept := make(map[string]bool, len(keep))
	for _, name := range keep {
		kept[name] = true
	}
	var errs []error
	for _, e := range entries {
		if e.Name() == dataTemp || generationName.MatchString(e.Name()) && !kept[e.Name()] {
			errs = append(errs, d.root.RemoveAll(e.Name())) // a link is removed and not followed
		}
	}
	return errors.Join(errs...)
}

// strip removes the files of an identity from a generation.
func (d *directory) strip(generation string, sets []Names) error {
	var errs []error
	for _, n := range sets {
		for name, k := range n.kinds() {
			if !k.identity() || generation == "" {
				continue
			}
			if err := d.root.Remove(path.Join(generation, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// linkTo is where the link of a name leads.
func linkTo(name string) string { return filepath.Join(dataLink, name) }

func (c Config) modeOf(f file) fs.FileMode {
	if f.secret {
		return c.Mode
	}
	return publicMode
}

func ownerOf(info fs.FileInfo) int {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(st.Uid)
	}
	return -1
}

func groupOf(info fs.FileInfo) int {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(st.Gid)
	}
	return -1
}
