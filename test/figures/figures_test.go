package figures_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/meshca/meshca/test/figures"
	"github.com/meshca/meshca/test/parts"
)

func TestASheetIsThereAfterTheTest(t *testing.T) {
	root, err := parts.Root()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(root, figures.Dir, "TestASheetIsThereAfterTheTest.measured.txt")
	t.Cleanup(func() { _ = os.Remove(file) })
	t.Run("measured", func(t *testing.T) { figures.For(t).Add("p50 %d ms", 12) })
	text, err := os.ReadFile(file)
	if err != nil || !strings.HasPrefix(string(text), "TestASheetIsThereAfterTheTest/measured (") || !strings.HasSuffix(string(text), "\n  p50 12 ms\n") {
		t.Errorf("%v:\n%s", err, text)
	}
	t.Run("nothing", func(t *testing.T) { figures.For(t) })
	if _, err := os.Stat(filepath.Join(root, figures.Dir, "TestASheetIsThereAfterTheTest.nothing.txt")); !os.IsNotExist(err) {
		t.Errorf("a test that measured nothing has a sheet: %v", err)
	}
}
