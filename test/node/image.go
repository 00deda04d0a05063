package node

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
)

// Image is what a container is made of: files of this machine and nothing else. Pods name it as it is, and take it with
// imagePullPolicy Never or IfNotPresent.
type Image struct {
	// Name has a tag, and a host in front: localhost/envoy:1.
	Name string
	// Entrypoint is the program in the image, and its first arguments.
	Entrypoint []string
	// Files are paths in the image, each with the file of this machine that stands there; links are followed.
	Files map[string]string
	// User is a number, or uid:gid; empty is root.
	User string
	// Env is the environment; nil is PATH=/ alone.
	Env []string
	// Bare leaves out what many programs expect to find: see writeLayer.
	Bare bool
}

// blob is a piece of an image, by its digest.
type blob struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`

	content io.ReadSeeker
}

// Import makes the image and gives it to the node's containerd.
func (n *Node) Import(ctx context.Context, image Image) error {
	ctr, err := n.tool("ctr")
	if err != nil {
		return err
	}
	layer, err := os.CreateTemp(n.place.dir, "layer-")
	if err != nil {
		return err
	}
	defer os.Remove(layer.Name())
	defer layer.Close()
	from, to := io.Pipe()
	cmd := exec.CommandContext(ctx, ctr, "--address", n.Path("/run/containerd/containerd.sock"), "--namespace", "k8s.io", "images", "import", "-")
	cmd.Stdin = from
	go func() { _ = to.CloseWithError(image.write(to, layer)) }()
	out, err := cmd.CombinedOutput()
	if broken := from.Close(); err == nil {
		err = broken
	}
	if err != nil {
		return fmt.Errorf("image %s: %w: %s", image.Name, err, strings.TrimSpace(string(out)))
	}
	return nil
}

// write writes the image as an archive of the OCI's image layout. Its one layer goes through scratch, since its digest
// comes first.
func (i Image) write(w io.Writer, scratch *os.File) error {
	if err := i.writeLayer(scratch); err != nil {
		return err
	}
	layer, err := newBlob("application/vnd.oci.image.layer.v1.tar", scratch)
	if err != nil {
		return err
	}
	env := i.Env
	if env == nil {
		env = []string{"PATH=/"}
	}
	config, err := jsonBlob("application/vnd.oci.image.config.v1+json", map[string]any{
		"architecture": runtime.GOARCH, "os": "linux",
		"config": map[string]any{"Entrypoint": i.Entrypoint, "User": i.User, "Env": env},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{layer.Digest}},
	})
	if err != nil {
		return err
	}
	manifest, err := jsonBlob("application/vnd.oci.image.manifest.v1+json", map[string]any{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": []blob{layer},
	})
	if err != nil {
		return err
	}
	manifest.Annotations = map[string]string{"io.containerd.image.name": i.Name}
	index, err := jsonBlob("", map[string]any{"schemaVersion": 2, "manifests": []blob{manifest}})
	if err != nil {
		return err
	}
	archive := tar.NewWriter(w)
	layout := strings.NewReader(`{"imageLayoutVersion":"1.0.0"}`)
	err = errors.Join(writeEntry(archive, "oci-layout", layout.Size(), layout), writeEntry(archive, "index.json", index.Size, index.content))
	for _, b := range []blob{manifest, config, layer} {
		err = errors.Join(err, writeEntry(archive, "blobs/sha256/"+strings.TrimPrefix(b.Digest, "sha256:"), b.Size, b.content))
	}
	return errors.Join(err, archive.Close())
}

func jsonBlob(mediaType string, value any) (blob, error) {
	text, err := json.Marshal(value)
	if err != nil {
		return blob{}, err
	}
	return newBlob(mediaType, strings.NewReader(string(text)))
}

func newBlob(mediaType string, content io.ReadSeeker) (blob, error) {
	if _, err := content.Seek(0, io.SeekStart); err != nil {
		return blob{}, err
	}
	hash := sha256.New()
	size, err := io.Copy(hash, content)
	if err != nil {
		return blob{}, err
	}
	_, err = content.Seek(0, io.SeekStart)
	return blob{MediaType: mediaType, Digest: "sha256:" + hex.EncodeToString(hash.Sum(nil)), Size: size, content: content}, err
}

func writeEntry(w *tar.Writer, name string, size int64, content io.Reader) error {
	if err := w.WriteHeader(&tar.Header{Name: name, Size: size, Mode: 0o644}); err != nil {
		return err
	}
	_, err := io.Copy(w, content)
	return err
}

// writeLayer writes the files, the folders that lead to them, and unless the image is bare what programs expect to find:
// /tmp, and names for root and nobody.
func (i Image) writeLayer(w io.Writer) error {
	layer := tar.NewWriter(w)
	folders := map[string]bool{}
	if !i.Bare {
		folders["etc"], folders["tmp"] = true, true
		passwd := "root:x:0:0:root:/:/\nnobody:x:65534:65534::/:/\n"
		err := errors.Join(
			layer.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}),
			layer.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "etc/", Mode: 0o755}),
			writeEntry(layer, "etc/passwd", int64(len(passwd)), strings.NewReader(passwd)),
		)
		if err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(i.Files)) {
		target := strings.TrimPrefix(path.Clean(name), "/")
		if err := writeFolders(layer, path.Dir(target), folders); err != nil {
			return err
		}
		if err := writeFile(layer, target, i.Files[name]); err != nil {
			return err
		}
	}
	return layer.Close()
}

func writeFolders(w *tar.Writer, folder string, made map[string]bool) error {
	if folder == "." || made[folder] {
		return nil
	}
	if err := writeFolders(w, path.Dir(folder), made); err != nil {
		return err
	}
	made[folder] = true
	return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: folder + "/", Mode: 0o755})
}

func writeFile(w *tar.Writer, target, source string) error {
	f, err := os.Open(source)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := w.WriteHeader(&tar.Header{Name: target, Size: info.Size(), Mode: int64(info.Mode() & fs.ModePerm)}); err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	return err
}

// tool is one of the parts that are run here, not in the node.
func (n *Node) tool(name string) (string, error) {
	bin, err := binaries()
	return filepath.Join(bin, name), err
}
