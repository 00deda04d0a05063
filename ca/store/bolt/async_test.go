package bolt

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Both ways of writing bring the same to the file.
func TestWaysOfWriting(t *testing.T) {
	groups := []group{{1, 2, []byte("value")}, {3, 3, bytes.Repeat([]byte{1}, 3*walBlock)}, {4, 4, bytes.Repeat([]byte{2}, int(walArea)-walHeader-5*walBlock)}}
	for name, open := range map[string]func(*os.File) (walFile, error){
		"asynchronous": openAsync,
		"fdatasync":    func(f *os.File) (walFile, error) { return dataFile{f}, nil },
	} {
		t.Run(name, func(t *testing.T) {
			f, err := os.Create(filepath.Join(t.TempDir(), "log"))
			must(t, err)
			must(t, f.Truncate(walArea.file()))
			file, err := open(f)
			if err != nil {
				_ = f.Close()
				t.Skipf("not on this file system, or not in this sandbox: %v", err)
			}
			w := &wal{file: file, size: walArea}
			must(t, w.probe())
			for _, g := range groups {
				must(t, w.append(g))
			}
			if w.fits(groups[0]) {
				t.Error("there is room behind what fills the area")
			}
			got, _, err := readLog(file, walArea, 0)
			if err != nil || !slices.EqualFunc(got, groups, sameGroup) {
				t.Errorf("%s, %v", spans(got), err)
			}
			must(t, file.Close())
			if err := file.WriteDurably(make([]byte, walBlock), walBlock); err == nil {
				t.Error("it writes when it is closed")
			}
		})
	}
}
