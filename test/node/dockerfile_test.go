package node

import (
	"bytes"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

const dockerfile = `ARG GO
FROM ${GO} AS build
RUN make
# the one
FROM scratch AS one
COPY --from=build /out/one /one
ENV PATH=/
USER 1:2
ENTRYPOINT ["/one", "run"]
FROM scratch AS two
`

func TestReadStage(t *testing.T) {
	got, err := readStage(strings.NewReader(dockerfile), "one")
	want := Image{Files: map[string]string{"/one": "/out/one"}, Env: []string{"PATH=/"}, User: "1:2", Entrypoint: []string{"/one", "run"}, Bare: true}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
	for name, text := range map[string]string{
		"not there":                "FROM scratch AS two",
		"of something else":        "FROM debian AS one\nUSER 1:2\nENTRYPOINT [\"/one\"]",
		"without an entrypoint":    "FROM scratch AS one\nUSER 1:2",
		"without a user":           "FROM scratch AS one\nENTRYPOINT [\"/one\"]",
		"with what is not known":   "FROM scratch AS one\nUSER 1:2\nENTRYPOINT [\"/one\"]\nLABEL a=b",
		"of the context":           "FROM scratch AS one\nUSER 1:2\nENTRYPOINT [\"/one\"]\nCOPY a /a",
		"with several at once":     "FROM scratch AS one\nUSER 1:2\nENTRYPOINT [\"/one\"]\nCOPY --from=build /a /b /",
		"with a shell":             "FROM scratch AS one\nUSER 1:2\nENTRYPOINT /one",
		"with a folder to copy in": "FROM scratch AS one\nUSER 1:2\nENTRYPOINT [\"/one\"]\nCOPY --from=build /a /b/",
	} {
		if got, err := readStage(strings.NewReader(text), "one"); err == nil {
			t.Errorf("a stage %s was read: %+v", name, got)
		}
	}
}

// TestDockerfileBuildsAsTheTestsDo: the content of the images is read from the Dockerfile; how their binaries are built
// stands there, in the Makefile, and here.
func TestDockerfileBuildsAsTheTestsDo(t *testing.T) {
	read := func(name string) string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join("../..", name))
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	docker, makefile, mod := read("deploy/Dockerfile"), read("Makefile"), read("go.mod")
	flags := strings.TrimPrefix(buildFlags, "-ldflags=")
	for file, wants := range map[string][]string{
		docker:   {"CGO_ENABLED=0 ", `GOFLAGS="` + goFlags + `"`, `-ldflags "` + flags + ` -X main.version=$VERSION"`},
		makefile: {"export CGO_ENABLED := 0", "export GOFLAGS := " + goFlags + "\n", `-ldflags "` + flags + ` -X main.version=$(VERSION)"`},
	} {
		for _, want := range wants {
			if !strings.Contains(file, want) {
				t.Errorf("%.40q… lacks %q", file, want)
			}
		}
	}
	version := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(mod)
	if version == nil || !strings.Contains(docker, "ARG GO_IMAGE=golang:"+version[1]+"\n") {
		t.Errorf("the Dockerfile's compiler is not that of go.mod: %q", version)
	}
}

// TestReleasedImages: what is in them, as whom they run, and that they come out the same each time.
func TestReleasedImages(t *testing.T) {
	for stage, want := range map[string]struct {
		user  string
		files []string
	}{
		"meshca":       {"65532:65532", []string{"/certctl", "/etc/ssl/certs/ca-certificates.crt", "/meshca"}},
		"meshca-agent": {"0:0", []string{"/certctl", "/meshca-agent"}},
	} {
		image, err := Released(t.Context(), stage, t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if image.User != want.user || len(image.Files) != len(want.files) || image.Entrypoint[0] != "/"+stage {
			t.Errorf("%s is %+v", stage, image)
		}
		for _, file := range want.files {
			if image.Files[file] == "" {
				t.Errorf("%s lacks %s", stage, file)
			}
		}
		again, err := Released(t.Context(), stage, t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		if first, second := archive(t, image), archive(t, again); !bytes.Equal(first, second) {
			t.Errorf("%s, built twice, is not the same: %d and %d bytes", stage, len(first), len(second))
		}
	}
}

func archive(t *testing.T, i Image) []byte {
	t.Helper()
	scratch, err := os.Create(filepath.Join(t.TempDir(), "layer"))
	if err != nil {
		t.Fatal(err)
	}
	defer scratch.Close()
	var out bytes.Buffer
	if err := i.write(&out, scratch); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
