// Package keyfile reads and writes files that hold secrets: nobody but their owner may use them, they are written as a
// whole or not at all, and they last when a write returns.
package keyfile

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// maxBytes bounds what is read of a certificate, key or passphrase file.
const maxBytes = 1 << 20

// Check refuses a file that others than its owner can read or write. A symlink is followed: mounted secrets are some.
func Check(path string) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	return check(path, info)
}

func check(path string, info fs.FileInfo) error {
	switch {
	case info.Mode()&fs.ModeSymlink != 0:
		return fmt.Errorf("%s is a symlink: whoever can change it would choose which key is used. Put the file itself there", path)
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is no regular file", path)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s has mode %04o, so others than its owner can use it. Run: chmod 600 %s", path, info.Mode().Perm(), path)
	}
	return nil
}

// Read reads a file of at most 1 MiB.
func Read(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxBytes {
		return nil, fmt.Errorf("%s has %d bytes, and at most %d are read", path, info.Size(), maxBytes)
	}
	return os.ReadFile(path)
}

// ReadOwn checks and reads a file that this program wrote: no symlink leads there.
func ReadOwn(path string) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if err := check(path, info); err != nil {
		return nil, err
	}
	return Read(path)
}

// ReadSecret checks and reads a file that holds a passphrase or a PIN, without the line's end.
func ReadSecret(path string) ([]byte, error) {
	if err := Check(path); err != nil {
		return nil, err
	}
	data, err := Read(path)
	if err != nil {
		return nil, err
	}
	secret := bytes.TrimRight(data, "\r\n")
	if len(secret) == 0 {
		return nil, fmt.Errorf("%s is empty", path)
	}
	return secret, nil
}

// WriteNew writes a file that must not be there yet; else the error is fs.ErrExist.
func WriteNew(path string, data []byte, mode fs.FileMode) (err error) {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	if _, err = file.Write(data); err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// unfinished is in the names of files that Replace has not renamed yet.
const unfinished = ".unfinished-"

// Replace swaps the content of a file with mode 0600 as a whole: a reader, and whoever comes behind a crash, sees the old
// one or the new one.
func Replace(path string, data []byte) (err error) {
	file, err := os.CreateTemp(filepath.Dir(path), unfinished+"*") // with mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(file.Name())
		}
	}()
	if _, err = file.Write(data); err == nil {
		err = file.Sync()
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return err
	}
	if err = os.Rename(file.Name(), path); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// Remove takes a file away for good. One that is not there is no error.
func Remove(path string) error {
	if err := os.Remove(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	return SyncDir(filepath.Dir(path))
}

// OpenDir makes a directory with mode 0700, or refuses one that others can enter, or that a symlink leads to. What a
// crash left of Replace is removed.
func OpenDir(path string) error {
	if err := os.MkdirAll(path, 0o700); err != nil {
		return err
	}
	info, err := os.Lstat(path)
	switch {
	case err != nil:
		return err
	case info.Mode()&fs.ModeSymlink != 0:
		return fmt.Errorf("%s is a symlink: whoever can change it would choose which keys are used. Put the directory itself there", path)
	case !info.IsDir():
		return fmt.Errorf("%s is no directory", path)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Errorf("%s has mode %04o, so others than its owner can enter it. Run: chmod 700 %s", path, info.Mode().Perm(), path)
	}
	left, err := filepath.Glob(filepath.Join(Literal(path), unfinished+"*"))
	if err != nil {
		return err
	}
	for _, file := range left {
		if err := Remove(file); err != nil {
			return err
		}
	}
	return nil
}

// SyncDir makes what was made, renamed or removed in a directory last.
func SyncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// Literal makes a directory's name mean itself in a pattern of filepath.Glob.
func Literal(dir string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(dir)
}
