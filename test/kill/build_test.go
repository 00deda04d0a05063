// Package kill ends real meshca processes with kill -9 at each place where a Rollout persists, publishes or signs, and
// looks from outside at what the next process makes of it.
package kill

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/meshca/meshca/attestor/kubernetes/localissuer"
	"github.com/meshca/meshca/test/parts"
)

// instrumented are our packages whose failpoints are built in: comments that gofail turns into code, in a copy.
var instrumented = []string{"rotation", "ca", "ca/keyring", "ca/registration", "ca/rollout", "ca/store/bolt", "ca/upstream/disk", "api/issuance", "cmd/meshca"}

// built is a meshca with failpoints, and an issuer of tokens for all of them: its key takes longer to make than a CA to start.
type built struct {
	dir, meshca string
	tokens      *localissuer.Issuer
	// points are the names of our failpoints, bbolt those of bbolt.
	points, bbolt []string
}

var build = sync.OnceValues(func() (built, error) {
	dir, err := os.MkdirTemp("", "meshca-kill-")
	if err != nil {
		return built{}, err
	}
	b := built{dir: dir, meshca: filepath.Join(dir, "meshca")}
	if b.tokens, err = localissuer.Open(dir, tokenIssuer); err != nil {
		return b, err
	}
	return b, b.make()
})

func TestMain(m *testing.M) {
	code := m.Run()
	if b, _ := build(); b.dir != "" {
		_ = os.RemoveAll(b.dir)
	}
	os.Exit(code)
}

// make builds: gofail writes its code into copies of the packages, which an overlay puts in the place of the originals. A
// module's files cannot be overlaid, so bbolt is replaced by its copy, in a go.mod that stands in for ours.
func (b *built) make() error {
	root, err := parts.Root()
	if err != nil {
		return err
	}
	if _, err := run(filepath.Join(root, "test/tools/gofail"), "go", "build", "-o", b.gofail(), "go.etcd.io/gofail"); err != nil {
		return err
	}
	overlay := map[string]string{}
	for _, pkg := range instrumented {
		copied := filepath.Join(b.dir, "copy", pkg)
		if filepath.Dir(pkg) == "cmd" {
			copied = filepath.Join(copied, "main") // gofail takes a package for what its folder is called
		}
		if err := b.instrument(filepath.Join(root, pkg), copied, inserts(pkg), overlay); err != nil {
			return err
		}
	}
	data, err := json.Marshal(map[string]any{"Replace": overlay})
	if err != nil {
		return err
	}
	overlayFile := filepath.Join(b.dir, "overlay.json")
	if err := os.WriteFile(overlayFile, data, 0o600); err != nil {
		return err
	}
	mod, err := b.module(root)
	if err != nil {
		return err
	}
	_, err = run(root, "go", "build", "-mod=mod", "-modfile="+mod, "-overlay="+overlayFile, "-o", b.meshca, "./cmd/meshca")
	return err
}

func (b *built) gofail() string { return filepath.Join(b.dir, "gofail") }

// instrument copies a package's files, has gofail work on the copies, and enters what differs in the overlay.
func (b *built) instrument(from, to string, further []insert, overlay map[string]string) error {
	if err := copyPackage(from, to); err != nil {
		return err
	}
	points, err := pointsOf(to)
	if err != nil {
		return err
	}
	b.points = append(b.points, points...)
	for _, i := range further {
		if err := i.put(to); err != nil {
			return err
		}
	}
	if _, err := run(to, b.gofail(), "enable", to); err != nil {
		return err
	}
	files, err := filepath.Glob(filepath.Join(to, "*.go"))
	if err != nil {
		return err
	}
	for _, file := range files {
		overlay[filepath.Join(from, filepath.Base(file))] = file
	}
	return nil
}

var pointForm = regexp.MustCompile(`(?m)^\s*// gofail: var (\w+) (?:struct\{\}|string)$`)

// pointsOf are the failpoints that the comments of a folder's files name.
func pointsOf(dir string) (all []string, err error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		for _, m := range pointForm.FindAllStringSubmatch(string(text), -1) {
			all = append(all, m[1])
		}
	}
	return all, nil
}

// module writes a go.mod like ours, with gofail and with the copy of bbolt.
func (b *built) module(root string) (string, error) {
	bbolt, err := run(root, "go", "list", "-m", "-f", "{{.Dir}}", "go.etcd.io/bbolt")
	if err != nil {
		return "", err
	}
	version, err := run(filepath.Join(root, "test/tools/gofail"), "go", "list", "-m", "-f", "{{.Version}}", "go.etcd.io/gofail")
	if err != nil {
		return "", err
	}
	replacement := filepath.Join(b.dir, "bbolt")
	if err := copyTree(bbolt, replacement); err != nil {
		return "", err
	}
	if b.bbolt, err = pointsOf(replacement); err != nil {
		return "", err
	}
	if _, err := run(replacement, b.gofail(), "enable", replacement); err != nil {
		return "", err
	}
	mod := filepath.Join(b.dir, "with-gofail.mod")
	var sums []byte
	for _, name := range []string{"go.sum", "test/tools/gofail/go.sum"} {
		data, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			return "", err
		}
		sums = append(sums, data...)
	}
	data, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(mod, data, 0o600); err != nil {
		return "", err
	}
	if err := os.WriteFile(strings.TrimSuffix(mod, ".mod")+".sum", sums, 0o600); err != nil {
		return "", err
	}
	_, err = run(root, "go", "mod", "edit", "-require=go.etcd.io/gofail@"+version, "-replace=go.etcd.io/bbolt="+replacement, mod)
	return mod, err
}

func copyPackage(from, to string) error {
	files, err := filepath.Glob(filepath.Join(from, "*.go"))
	if err != nil {
		return err
	}
	if err := os.MkdirAll(to, 0o700); err != nil {
		return err
	}
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(to, filepath.Base(file)), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// copyTree copies a module: its go.mod, and the Go files of all its packages.
func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.IsDir() {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if err := copyPackage(path, filepath.Join(to, rel)); err != nil {
			return err
		}
		if rel != "." {
			return nil
		}
		data, err := os.ReadFile(filepath.Join(from, "go.mod"))
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(to, "go.mod"), data, 0o600)
	})
}

func run(dir, name string, args ...string) (string, error) {
	c := exec.Command(name, args...)
	c.Dir = dir
	var failed strings.Builder
	c.Stderr = &failed
	out, err := c.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, failed.String())
	}
	return strings.TrimSpace(string(out)), nil
}

// steps are the failpoints at which processes are killed: before and behind each order and step of a Rollout, each change of
// the bundle and each place that it goes to, each signature, each intermediate that comes and goes, each renewal that is
// ordered, each agent that is admitted or acknowledges, on the ledger's way through its log into the store, and inside bbolt's
// commit. (bbolt has others, for its own faults.)
var steps = []string{
	"rolloutOrdered", "rolloutOrderEntered", "rolloutStepDone", "rolloutStepEntered", "rolloutPublished", "rolloutBeforeAssign",
	"rolloutAssigned", "rolloutRenewing", "rolloutBeforeWithdraw", "bundleMade", "bundleStored", "bundlePublished", "bundleFileMade",
	"bundleFileWritten", "stateMade", "stateSent", "bundleAcknowledged", "agentAdmitting", "agentAdmitted", "renewalOrdered",
	"renewalStored", "renewalPublished", "intermediateAsked", "intermediateSigned", "intermediateInUse", "intermediatesForgotten",
	"intermediatesReplaced", "keyRecordMade", "keyRecordWritten", "leafPrepared",
	"ledgerDurable", "ledgerFolded", "leafRecorded", "leafSigned", "rootKeyWritten",
	"rootMade", "beforeSyncDataPages", "beforeWriteMetaError", "beforeSyncMetaPage",
}

// A kill that hits nothing proves nothing: each failpoint stands in the code, and each of ours is known here.
func TestFailpointsAreBuiltIn(t *testing.T) {
	b, err := build()
	if err != nil {
		t.Fatal(err)
	}
	all := slices.Concat(steps, startSteps)
	for _, name := range all {
		if !slices.Contains(b.points, name) && !slices.Contains(b.bbolt, name) {
			t.Errorf("no failpoint %s is built in: %v, %v", name, b.points, b.bbolt)
		}
	}
	for _, name := range b.points {
		if !slices.Contains(all, name) {
			t.Errorf("nobody is killed at the failpoint %s", name)
		}
	}
}
