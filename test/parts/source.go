package parts

import (
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// SeeSource reads the names of this module's files. Go's test cache keeps a result until something changes that the test has
// read; what a `go build` reads that a test starts it does not know. Without this, a test of a command that was built so would
// be taken to have passed with source that it never ran. Root and Start do it, too; whoever builds without them calls it.
func SeeSource() {
	if flag.Parsed() { // before a TestMain has called Run the cache does not listen
		seeSource()
	}
}

var seeSource = sync.OnceFunc(func() {
	root, err := findRoot()
	if err != nil {
		return // a program outside of the repository, whose results nobody keeps
	}
	for _, name := range topFolders(root) {
		_ = filepath.WalkDir(filepath.Join(root, name), func(string, fs.DirEntry, error) error { return nil })
	}
	_, _ = os.Stat(filepath.Join(root, "go.sum")) // go.mod was read
})

// topFolders are those with source. The cache is not to see the root itself, in which make and git leave things.
func topFolders(root string) (names []string) {
	fd, err := syscall.Open(root, syscall.O_RDONLY|syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0) // os.Open would tell the cache
	if err != nil {
		return nil
	}
	dir := os.NewFile(uintptr(fd), root)
	defer func() { _ = dir.Close() }()
	entries, _ := dir.ReadDir(-1)
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") && e.Name() != "bin" {
			names = append(names, e.Name())
		}
	}
	return names
}
