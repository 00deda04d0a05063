package keyfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func wants(t *testing.T, err error, words string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), words) {
		t.Errorf("got %v, want %q", err, words)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestOthersMayNotUseIt(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "key"), filepath.Join(dir, "link")
	must(t, os.WriteFile(file, []byte("secret\r\n"), 0o600))
	must(t, os.Symlink(file, link))
	if s, err := ReadSecret(link); err != nil || string(s) != "secret" {
		t.Errorf("a mounted secret: %q, %v", s, err)
	}
	_, err := ReadOwn(link)
	wants(t, err, "is a symlink")
	if data, err := ReadOwn(file); err != nil || string(data) != "secret\r\n" {
		t.Errorf("%q, %v", data, err)
	}
	for _, mode := range []fs.FileMode{0o640, 0o604, 0o620, 0o602, 0o610} {
		must(t, os.Chmod(file, mode))
		wants(t, Check(file), "chmod 600")
		_, err := ReadOwn(file)
		wants(t, err, "chmod 600")
		_, err = ReadSecret(file)
		wants(t, err, "chmod 600")
	}
	wants(t, Check(dir), "no regular file")
	must(t, os.Chmod(file, 0o600))
	must(t, os.WriteFile(file, []byte("\n"), 0o600))
	_, err = ReadSecret(file)
	wants(t, err, "is empty")
	must(t, os.Truncate(file, maxBytes+1))
	_, err = Read(file)
	wants(t, err, "at most")
}

func TestADirectoryOfOnesOwn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a[b]", "keys")
	must(t, OpenDir(dir))
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	// What a crash left in the middle of a write may hold a key.
	must(t, os.WriteFile(filepath.Join(dir, unfinished+"123"), []byte("key"), 0o600))
	must(t, os.WriteFile(filepath.Join(dir, "whole"), []byte("key"), 0o600))
	must(t, OpenDir(dir))
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 || left[0].Name() != "whole" {
		t.Errorf("left %v, %v", left, err)
	}
	must(t, os.Chmod(dir, 0o750))
	wants(t, OpenDir(dir), "chmod 700")
	must(t, os.Chmod(dir, 0o700))
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(dir, link))
	wants(t, OpenDir(link), "is a symlink")
	wants(t, OpenDir(filepath.Join(dir, "whole")), "not a directory")
}

func TestReplaceIsWhole(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	must(t, Replace(file, []byte("one")))
	must(t, Replace(file, []byte("two")))
	if data, err := ReadOwn(file); err != nil || string(data) != "two" {
		t.Errorf("%q, %v", data, err)
	}
	// A failure leaves the old one, and no second copy of a key.
	taken := filepath.Join(dir, "taken")
	must(t, os.MkdirAll(filepath.Join(taken, "x"), 0o700))
	if Replace(taken, []byte("three")) == nil {
		t.Error("a directory was replaced by a file")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
		t.Errorf("left %v, %v", left, err)
	}
	must(t, Remove(file))
	must(t, Remove(file))
}

func TestWriteNewOverwritesNothing(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	must(t, WriteNew(file, []byte("one"), 0o600))
	if err := WriteNew(file, []byte("two"), 0o600); !errors.Is(err, fs.ErrExist) {
		t.Errorf("got %v", err)
	}
	if data, err := Read(file); err != nil || string(data) != "one" {
		t.Errorf("%q, %v", data, err)
	}
}
