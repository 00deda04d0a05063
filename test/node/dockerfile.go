package node

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/meshca/meshca/test/parts"
)

// certificates is the one file that the images take from the system that builds them; here it is this machine's.
const certificates = "/etc/ssl/certs/ca-certificates.crt"

// CA is the image of the CA, localhost/meshca:test, with certctl in it. Its binaries are built into dir.
func CA(ctx context.Context, dir string) (Image, error) {
	return Released(ctx, "meshca", dir)
}

// Agent is the image of the agent, localhost/meshca-agent:test. It is root's: kubelet's folders are.
func Agent(ctx context.Context, dir string) (Image, error) {
	return Released(ctx, "meshca-agent", dir)
}

// Released is what a final stage of deploy/Dockerfile makes, as localhost/STAGE:test. Its binaries are built into dir.
func Released(ctx context.Context, stage, dir string) (Image, error) {
	root, err := parts.Root()
	if err != nil {
		return Image{}, err
	}
	f, err := os.Open(filepath.Join(root, "deploy", "Dockerfile"))
	if err != nil {
		return Image{}, err
	}
	defer f.Close()
	image, err := readStage(f, stage)
	if err != nil {
		return Image{}, fmt.Errorf("deploy/Dockerfile: %w", err)
	}
	image.Name = "localhost/" + stage + ":test"
	for target, source := range image.Files {
		command, built := strings.CutPrefix(source, "/out/")
		switch {
		case built:
			image.Files[target] = filepath.Join(dir, command)
			err = build(ctx, image.Files[target], "./cmd/"+command)
		case source != certificates:
			err = fmt.Errorf("deploy/Dockerfile: %s is neither a command of this module nor known otherwise", source)
		}
		if err != nil {
			return Image{}, err
		}
	}
	return image, nil
}

// readStage reads a stage that begins FROM scratch. An instruction that it does not know is an error: the image would not
// be the one that Docker makes.
func readStage(dockerfile io.Reader, stage string) (Image, error) {
	image := Image{Files: map[string]string{}, Bare: true}
	inside, found := false, false
	lines := bufio.NewScanner(dockerfile)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if fields[0] == "FROM" {
			inside = fields[len(fields)-1] == stage
			if inside && strings.Join(fields, " ") != "FROM scratch AS "+stage {
				return image, fmt.Errorf("the stage %s does not begin FROM scratch", stage)
			}
			found = found || inside
			continue
		}
		if !inside {
			continue
		}
		if err := image.instruct(fields); err != nil {
			return image, err
		}
	}
	if !found {
		return image, fmt.Errorf("there is no stage %s", stage)
	}
	if len(image.Entrypoint) == 0 || image.User == "" {
		return image, fmt.Errorf("the stage %s names no ENTRYPOINT or no USER", stage)
	}
	return image, lines.Err()
}

// instruct follows one instruction.
func (i *Image) instruct(fields []string) error {
	rest := strings.Join(fields[1:], " ")
	switch fields[0] {
	case "COPY":
		if len(fields) != 4 || fields[1] != "--from=build" || strings.HasSuffix(fields[3], "/") {
			return errors.New("COPY is to have the form COPY --from=build FILE FILE: " + rest)
		}
		i.Files[fields[3]] = fields[2]
	case "USER":
		i.User = rest
	case "ENV":
		if len(fields) != 2 || !strings.Contains(rest, "=") {
			return errors.New("ENV is to have the form ENV NAME=VALUE: " + rest)
		}
		i.Env = append(i.Env, rest)
	case "ENTRYPOINT":
		if err := json.Unmarshal([]byte(rest), &i.Entrypoint); err != nil {
			return fmt.Errorf("ENTRYPOINT is to be a list: %w", err)
		}
	default:
		return fmt.Errorf("the instruction %s is not known", fields[0])
	}
	return nil
}
