// The phone's side in an Android app, with org.pytorch:pytorch_android_lite (1.13.1 or 2.1.0) and the exported file
// among the assets. Written against the library's interface; it has not been run on a device.

import android.content.res.AssetManager
import android.graphics.Bitmap
import java.io.ByteArrayOutputStream
import java.net.Socket
import kotlin.math.roundToInt
import org.pytorch.*

const val SIZE = 32  // pixels a side that the generator was trained for: at that size it hides

class Phone(assets: AssetManager) {
    private val generator: Module = LiteModuleLoader.loadModuleFromAsset(assets, "generator.ptl")  // once

    // The picture is shrunk first, and protected then.
    // The file normalises by itself: whoever uses TensorImageUtils passes mean (0, 0, 0) and deviation (1, 1, 1).
    fun protect(picture: Bitmap): Bitmap {
        val small = Bitmap.createScaledBitmap(picture, SIZE, SIZE, true)
        val n = SIZE * SIZE
        val pixels = IntArray(n).also { small.getPixels(it, 0, SIZE, 0, 0, SIZE, SIZE) }
        val x = FloatArray(3 * n) { (pixels[it % n] shr (16 - 8 * (it / n)) and 255) / 255f }  // all R, all G, all B
        val image = Tensor.fromBlob(x, longArrayOf(1, 3, SIZE.toLong(), SIZE.toLong()))
        val y = generator.forward(IValue.from(image)).toTensor().dataAsFloatArray
        fun level(i: Int) = (y[i] * 255).roundToInt()
        for (i in 0 until n) pixels[i] = (255 shl 24) or (level(i) shl 16) or (level(n + i) shl 8) or level(2 * n + i)
        return Bitmap.createBitmap(pixels, SIZE, SIZE, Bitmap.Config.ARGB_8888)
    }
}

// The protocol of the authors' app, for CIFAR-10's ten classes. Call it off the main thread. It returns the class, 0 to 9;
// negative if the service refused the picture.
fun recognise(picture: Bitmap, host: String, port: Int): Int = Socket(host, port).use {
    val png = ByteArrayOutputStream().also { picture.compress(Bitmap.CompressFormat.PNG, 100, it) }.toByteArray()
    it.getOutputStream().write(png.size.toString().padEnd(16).toByteArray() + png)
    it.getInputStream().read() - '0'.code
}
